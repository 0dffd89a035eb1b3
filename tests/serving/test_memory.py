"""Weights that don't fit are refused before they are read."""

import pytest
import torch
from support.chat_material import ChatMaterial

from parscale_adapt.serving import loading, memory
from parscale_adapt.serving.loading import find_speaker, load_speaker


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("memory"))


def sizes(*folders):
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def test_all_files_that_are_loaded_count_once(material):
    root = material.root
    adapters = [str(root / "two"), str(root / "four")]
    speaker = find_speaker(str(root / "backbone"), adapters=adapters)
    assert sum(path.stat().st_size for path in speaker.weight_files()) == sizes(
        root / "backbone", root / "two", root / "four"
    )
    assert speaker.name == "backbone"
    assert [path.parent for path in find_speaker(str(root / "export")).weight_files()] == [root / "export"]
    assert [path.parent for path in find_speaker(str(root / "backbone")).weight_files()] == [root / "backbone"]


def test_a_model_that_is_too_large_is_refused_before_it_is_read(material, monkeypatch):
    speaker = find_speaker(str(material.root / "backbone"), adapters=[str(material.root / "two")])
    needed = sizes(material.root / "backbone", material.root / "two")
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    model, *_ = load_speaker(speaker)
    assert model is not None
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 1)
    monkeypatch.setattr(loading, "load_source", lambda source: pytest.fail("reads weights"))
    with pytest.raises(
        ValueError, match=r"The weights of backbone need 0\.0 GiB of memory, and 0\.0 GiB are free on this"
    ):
        load_speaker(speaker)


def test_a_container_bounds_what_is_free(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    of_the_system = memory.free_memory(cpu)
    assert of_the_system > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert memory.free_memory(cpu) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_memory(cpu) == 4300
