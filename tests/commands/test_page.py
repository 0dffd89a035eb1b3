"""`parscale page`: what it opens without a model, what it refuses before it serves, what it says on the page."""

import json
import shutil
import socket
import time

import pytest
from support.chat_material import ChatMaterial

from parscale_adapt.page import demo
from parscale_adapt.page.resident import Resident
from parscale_adapt.serving import memory
from parscale_adapt.serving.loading import find_speaker


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("page"))


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def loaded(*arguments, **options):
    resident = Resident(find_speaker(*map(str, arguments), **options))
    assert resident.status()["state"] == "loading"
    with pytest.raises(ValueError, match="is being loaded: ask again in a moment"):
        resident.answers()
    resident.start()
    end = time.monotonic() + 60
    while resident.status()["state"] == "loading":
        assert time.monotonic() < end
        time.sleep(0.02)
    return resident


def test_without_a_model_it_opens_what_the_demo_left(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "demo"
    shutil.copytree(material.root / "backbone", folder / "backbone-0123")
    shutil.copytree(material.root / "four", folder / "P4_frozen_seed0")
    shutil.copytree(material.root / "four", folder / "P4_full_seed0")
    change_json(folder / "P4_full_seed0" / "adapter_config.json", train_backbone=True)
    model, adapters = demo.find_demo()
    assert model == "runs/demo/backbone-0123"
    assert adapters == ["P4_frozen_seed0=runs/demo/P4_frozen_seed0"]
    status = loaded(model, adapters=adapters).status()
    assert status["state"] == "ready"
    assert status["voices"] == [{"name": "backbone", "num_streams": 1}, {"name": "P4_frozen_seed0", "num_streams": 4}]
    assert status["context"] == 512


def test_without_a_model_and_a_demo_it_says_what_to_run(parscale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = parscale("page")
    assert code == 1
    assert "run `make demo` first, or give a model with `parscale page MODEL --adapter NAME=PATH`" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "There is no folder nothing"),
        (("{root}/backbone", "--adapter", "nothing"), "There is no folder nothing"),
        (("{root}/export", "--adapter", "{root}/two"), "has streams of its own, adapters go on a plain backbone"),
        (("{root}/backbone", "--law", "nothing"), "neither stack-v2-python nor pile nor a file"),
        (("{root}/backbone", "--port", "{taken}"), "The server can't listen on port"),
    ],
)
def test_what_can_not_be_opened_is_refused_in_one_sentence(parscale, material, monkeypatch, arguments, message):
    monkeypatch.setattr("parscale_adapt.page.server.serve", lambda *arguments: pytest.fail("serves"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"root": material.root, "taken": taken.getsockname()[1]}
        code, _, errors = parscale("page", *(argument.format(**places) for argument in arguments))
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1


def test_missing_packages_are_named(parscale, material, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = parscale("page", material.root / "backbone")
    assert code == 1
    assert "The page needs starlette and uvicorn: install what it needs with `pip install '.[page]'`." in errors


def test_an_adapter_of_another_backbone_is_one_sentence_on_the_page(material, tmp_path, capsys):
    other = shutil.copytree(material.root / "two", tmp_path / "other")
    fingerprint = json.loads((other / "adapter_config.json").read_text())["backbone_fingerprint"]
    changed = {
        name: value if name == "shape" else "0123456789abcdef fedcba9876543210" for name, value in fingerprint.items()
    }
    change_json(other / "adapter_config.json", backbone_fingerprint=changed)
    resident = loaded(material.root / "backbone", adapters=[str(material.root / "four"), str(other)])
    status = resident.status()
    assert status["state"] == "failed"
    assert "was trained on another backbone" in status["problem"]
    assert "\n" not in status["problem"]
    assert status["problem"] in capsys.readouterr().err
    with pytest.raises(ValueError, match="backbone"):
        resident.answers()


def test_a_model_too_large_for_memory_is_one_sentence_on_the_page(material, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    status = loaded(material.root / "backbone").status()
    assert status["state"] == "failed"
    assert status["problem"].startswith("The weights of backbone need 0.0 GiB of memory, and 0.0 GiB are free")


def test_an_unforeseen_error_is_named_on_the_page(material, monkeypatch, capsys):
    monkeypatch.setattr("parscale_adapt.page.resident.load_speaker", lambda speaker: 1 / 0)
    status = loaded(material.root / "backbone").status()
    assert status["problem"] == "backbone could not be loaded (ZeroDivisionError): division by zero"
    assert "Traceback" in capsys.readouterr().err
