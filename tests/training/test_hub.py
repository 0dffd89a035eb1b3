"""What is pushed: the final folder, once, when it is complete."""

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from parscale_adapt.training import hub
from parscale_adapt.training.hub import asking_the_hub
from parscale_adapt.training.unused_options import CPT, refuse_unused_options


PUSH = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": "hf_secret"}


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 2}])
def test_the_final_folder_is_pushed_once(recipes, material, tmp_path, saving):
    pushed = tmp_path / "pushed"
    options = material.cpt_options(max_steps=3, **PUSH, **saving)
    result = recipes.run("cpt", fault=("hub", 0, str(pushed)), **options).check()
    names = {path.name for path in result.output_dir.iterdir() if path.is_file()} - {".lock"}
    assert {path.name for path in pushed.iterdir()} == names
    assert {"README.md", "metrics.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert (pushed / "README.md").read_text() == (result.output_dir / "README.md").read_text()
    assert "loss curve" in (pushed / "README.md").read_text()
    found = load_file(pushed / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in result.tensors.items())
    assert (tmp_path / "pushed.pushes").read_text() == "pushed\n"
    assert not [path for path in pushed.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_a_hub_that_refuses_what_was_trained(recipes, material):
    result = recipes.run("cpt", fault=("hub", 0, ""), **material.cpt_options(**PUSH))
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr()
    (sentence,) = result.errors()
    folder = result.output_dir
    assert f"the trained model lies in {folder}, saved, verified and described, but the hub refused" in sentence
    assert "HfHubHTTPError: 403 Forbidden" in sentence
    assert f"push it later with: hf upload me/model {folder} --exclude 'checkpoint-*'" in sentence
    assert (folder / "metrics.json").is_file()


def test_a_hub_without_a_repository_is_known_before_the_first_step(recipes, material):
    result = recipes.run("cpt", fault=("hub", 0, "no repository"), **material.cpt_options(**PUSH))
    assert result.exit_code == 1
    assert result.errors() == ["error: the hub refused `push_to_hub`: ConnectionError: nobody answers"]
    assert result.batches() == []


def test_a_missing_token_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="401; no token was found: give --hub_token"), asking_the_hub(training):
        raise OSError("401")


@pytest.mark.parametrize("option", [{"hub_model_id": "me/model"}, {"hub_token": "hf_secret"}])
def test_hub_options_without_a_push_are_refused(tmp_path, option):
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **option)
    with pytest.raises(ValueError, match=r"has no effect in cpt.py.*--push_to_hub true") as error:
        refuse_unused_options(training, CPT)
    assert "hf_secret" not in str(error.value)
