"""Saves are read back and compared; what fails leaves what was there before."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_model

from parscale_adapt import ParScaleConfig
from parscale_adapt.training.saving import forget_verified, record_verified, replacing_folder, verify_save, whole_state


def model_with(train_backbone=False, **fields):
    config = ParScaleConfig(num_streams=2, num_prefix_tokens=3, train_backbone=train_backbone, **fields)
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize("fields", [{}, {"train_backbone": True}, {"init_weights": "reparameterized"}])
def test_a_complete_save_is_verified(tmp_path, fields):
    model = model_with(**fields)
    model.save_pretrained(tmp_path, state_dict=whole_state(model, "default"))
    num_tensors = len(load_file(tmp_path / "adapter_model.safetensors"))
    assert verify_save(model, tmp_path, "default") == num_tensors


def test_whole_state_holds_what_the_adapter_needs_and_nothing_else():
    frozen, full = model_with(), model_with(train_backbone=True)
    names = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert whole_state(frozen, "default").keys() == names
    assert whole_state(full, "default").keys() == dict(full.named_parameters()).keys()
    assert whole_state(full, "default", keep=False) == {}


def missing_file(path, name):
    path.unlink()


def missing_tensor(path, name):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def changed_value(path, name):
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += 1e-4
    save_file(tensors, path)


def changed_shape(path, name):
    tensors = load_file(path)
    tensors[name] = tensors[name][:1]
    save_file(tensors, path)


def unexpected_tensor(path, name):
    tensors = load_file(path)
    save_file({**tensors, f"{name}_copy": torch.zeros(1)}, path)


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (missing_file, "adapter_model.safetensors was not written"),
        (missing_tensor, "is missing"),
        (changed_value, "differs from the live tensor"),
        (changed_shape, "differs from the live tensor"),
        (unexpected_tensor, "is unexpected"),
    ],
)
def test_a_damaged_save_is_found(tmp_path, train_backbone, damage, complaint):
    model = model_with(train_backbone)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name = sorted(load_file(path))[-1]
    damage(path, name)
    with pytest.raises(ValueError, match=complaint):
        verify_save(model, tmp_path, "default")


def test_many_problems_are_counted(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    with pytest.raises(ValueError, match="and 5 more"):
        verify_save(model, tmp_path, "default")


def fail_while_writing(target):
    with replacing_folder(target) as staging:
        (staging / "weights").write_text("new")
        raise RuntimeError("disk full")


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "weights").write_text("old")
    record_verified(target, 1)
    with pytest.raises(RuntimeError, match="disk full"):
        fail_while_writing(target)
    assert (target / "weights").read_text() == "old"
    assert (target / "verified_save.json").is_file()
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_replaces_what_it_names_and_keeps_the_rest(tmp_path):
    target = tmp_path / "run"
    (target / "folder").mkdir(parents=True)
    (target / "folder" / "old").write_text("old")
    (target / "run.json").write_text("kept")
    with replacing_folder(target) as staging:
        (staging / "folder").mkdir()
        (staging / "folder" / "new").write_text("new")
        record_verified(staging, 1)
    assert [path.name for path in (target / "folder").iterdir()] == ["new"]
    assert (target / "run.json").read_text() == "kept"
    assert (target / "verified_save.json").is_file()


def test_other_ranks_write_nothing(tmp_path):
    with replacing_folder(tmp_path / "run", is_main_process=False) as staging:
        assert not staging.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_mark_can_be_taken_back(tmp_path):
    record_verified(tmp_path, 3)
    forget_verified(tmp_path)
    forget_verified(tmp_path)
    assert list(tmp_path.iterdir()) == []
