"""Published checkpoints become adapters; weights that differ are kept, damaged files get one sentence."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.outputs import logits
from support.published_checkpoints import change_tensors, save_backbone, save_published
from support.tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from parscale_adapt.checkpoints.importing import import_published


@pytest.fixture
def backbone(tmp_path):
    save_backbone(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def published(tmp_path, backbone):
    return save_published(tmp_path / "published", backbone, num_streams=2)


def test_with_an_equal_backbone_the_adapter_holds_the_streams_alone(tmp_path, backbone, published):
    report = import_published(str(published), tmp_path / "adapter", backbone=str(backbone))
    assert not report.carries_backbone
    assert (
        report.comparison.num_identical
        == report.comparison.num_tensors
        == len(load_file(backbone / "model.safetensors"))
    )
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert report.num_tensors == len(names) == 2 * 2 + 4
    assert all("parscale_" in name for name in names)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(published)))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(backbone)))


def test_three_published_models_are_switched_on_one_resident_backbone(tmp_path, backbone):
    model = None
    for num_streams in (2, 4, 8):
        source = save_published(tmp_path / f"P{num_streams}", backbone, num_streams, seed=num_streams)
        folder = tmp_path / f"adapter-{num_streams}"
        import_published(str(source), folder, backbone=str(backbone))
        if model is None:
            resident = AutoModelForCausalLM.from_pretrained(backbone)
            model = PeftModel.from_pretrained(resident, folder, adapter_name="P2")
        else:
            model.load_adapter(folder, f"P{num_streams}")
    for name in ("P8", "P2", "P4", "P2"):
        model.set_adapter(name)
        expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        torch.testing.assert_close(logits(model), expected)


def test_without_a_backbone_the_adapter_brings_its_own(tmp_path, published):
    report = import_published(str(published), tmp_path / "adapter")
    assert report.carries_backbone
    assert report.comparison is None
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(published)))


@pytest.mark.parametrize(("tolerance", "carries_backbone"), [(0.0, True), (1e-4, True), (1e-2, False)])
def test_weights_that_differ_are_kept(tmp_path, backbone, published, tolerance, carries_backbone):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][0, 0] += 1e-3

    change_tensors(published / "model.safetensors", change)
    report = import_published(str(published), tmp_path / "adapter", str(backbone), tolerance)
    comparison = report.comparison
    assert comparison.num_identical == comparison.num_tensors - 1
    assert comparison.largest_difference == pytest.approx(1e-3, rel=1e-3)
    assert comparison.different == ([name] if carries_backbone else [])
    assert report.carries_backbone == carries_backbone
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "adapter")
    kept = model.base_model.model.get_parameter(name)
    original = load_file((published if carries_backbone else backbone) / "model.safetensors")[name]
    assert torch.equal(kept, original)


def test_a_backbone_of_other_precision_but_the_same_values_is_equal(tmp_path):
    save_backbone(tmp_path / "half", dtype=torch.bfloat16)
    published = save_published(tmp_path / "published", tmp_path / "half", num_streams=2)
    save_backbone(tmp_path / "full", dtype=torch.bfloat16).float().save_pretrained(tmp_path / "full")
    report = import_published(str(published), tmp_path / "adapter", str(tmp_path / "full"))
    assert report.comparison.num_identical == report.comparison.num_tensors
    assert not report.carries_backbone


def test_a_tied_lm_head_in_the_file_is_none_of_the_weights(tmp_path, backbone, published):
    embedding = "model.embed_tokens.weight"
    change_tensors(published / "model.safetensors", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    report = import_published(str(published), tmp_path / "adapter", str(backbone))
    assert not report.carries_backbone
    change_tensors(published / "model.safetensors", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"embeddings are tied, but lm_head.weight differs"):
        import_published(str(published), tmp_path / "other", str(backbone))


def test_tokenizer_and_card_come_along(tmp_path, backbone, published):
    (published / "tokenizer_config.json").write_text("{}")
    import_published(str(published), tmp_path / "adapter", str(backbone))
    assert (tmp_path / "adapter" / "tokenizer_config.json").read_text() == "{}"
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert "parscale" in data.tags
    assert data.base_model is None  # a folder is no repository
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    assert text.split("\n\n")[1].startswith("Import `parscale_adapt` before loading it")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def drop_tensor(folder):
    change_tensors(folder / "model.safetensors", lambda t: t.pop("model.norm.weight"))


def wrong_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name][:-1].clone()}))


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def lost_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {
        "other": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensor_not_in_its_shard(folder):
    lost_shard(folder)
    save_file({"another": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")


DAMAGES = [
    (truncate, "model.safetensors is truncated or damaged"),
    (empty, "model.safetensors is truncated or damaged"),
    (drop_tensor, "missing: model.norm.weight"),
    (wrong_shape, r"of wrong shape: model.layers.0.mlp.up_proj.weight \(47, 32\) instead of \(48, 32\)"),
    (pickle_only, r"holds its weights as a pickle \(pytorch_model.bin\)"),
    (no_weights, "holds no weights: there is no model.safetensors"),
    (broken_json, "config.json is damaged, it is no JSON"),
    (lost_shard, "its index names model-00002-of-00002.safetensors, which is not there"),
    (tensor_not_in_its_shard, "its index names other, which no shard holds"),
]


@pytest.mark.parametrize("which", ["published", "backbone"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_input_is_one_sentence_and_leaves_nothing(tmp_path, backbone, published, which, damage, message):
    damage({"published": published, "backbone": backbone}[which])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        import_published(str(published), tmp_path / "adapter", str(backbone))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_kinds_of_input_are_told_apart(tmp_path, backbone, published):
    save_backbone(tmp_path / "larger", hidden_size=40, num_attention_heads=4)
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    refused = {
        (str(backbone), None): "must hold a published ParScale checkpoint, got one of the model type 'qwen2'",
        (str(published), str(tmp_path / "larger")): "of wrong shape",
        (
            str(published),
            str(tmp_path / "llama"),
        ): "of the model type 'qwen2', got .*, a plain one of the type 'llama'",
        (str(published), str(published)): "a published one of the type 'qwen2_parscale'",
        (str(tmp_path / "nowhere"), None): "There is no folder",
        (str(published / "config.json"), None): "is a file: give the folder",
        ("no-such-owner/no-such-model", None): "it can't be fetched from the hub",
    }
    for (source, plain), message in refused.items():
        with pytest.raises(ValueError, match=message):
            import_published(source, tmp_path / "adapter", plain)
    assert not (tmp_path / "adapter").exists()


def test_a_repository_is_fetched_without_pickles_and_code(tmp_path, published, monkeypatch):
    asked = {}

    def fetch(repository, allow_patterns):
        asked[repository] = allow_patterns
        return published

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    import_published("someone/streams", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert asked.keys() == {"someone/streams"}
    assert not {"*", "*.bin", "*.py"} & set(asked["someone/streams"])
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == "someone/streams"


def test_an_output_folder_with_contents_is_left_alone(tmp_path, published):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "precious").write_text("kept")
    with pytest.raises(ValueError, match="is not an empty folder"):
        import_published(str(published), tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["precious"]
