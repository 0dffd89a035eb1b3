"""`verify` in a fresh process, and `inspect` from headers alone."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.published_checkpoints import change_tensors, save_backbone, save_published
from support.tiny_models import tiny_model, with_streams
from transformers import AutoModelForCausalLM

import parscale_adapt
from parscale_adapt.checkpoints import verifying
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.checkpoints.importing import import_published
from parscale_adapt.checkpoints.inspection import inspect_folder
from parscale_adapt.checkpoints.verifying import verify_checkpoint


@pytest.fixture
def adapter(tmp_path):
    save_backbone(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    with_streams(backbone, 4).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_export_passes_and_a_changed_weight_does_not(tmp_path, adapter):
    export_adapter(str(adapter), tmp_path / "out")
    report = verify_checkpoint(tmp_path / "out")
    assert report.passed
    assert report.largest_difference < 1e-5
    assert report.num_same_choices == report.num_tokens == 16
    assert report.made_by == parscale_adapt.__version__

    name = "model.layers.1.self_attn.parscale.prefix_v.weight"
    change_tensors(tmp_path / "out" / "model.safetensors", lambda tensors: tensors[name][-1].neg_())
    report = verify_checkpoint(tmp_path / "out")
    assert not report.passed
    assert report.largest_difference > 10 * report.tolerance


@pytest.mark.parametrize(
    ("change", "difference", "num_same_choices"),
    [
        (lambda logits: logits.add_(1e-5), 1e-5, 16),
        (lambda logits: logits[0, 3].neg_(), None, 15),
        (lambda logits: logits[0, 3].fill_(float("nan")), float("inf"), 15),
    ],
)
def test_differences_are_measured(tmp_path, adapter, monkeypatch, change, difference, num_same_choices):
    export_adapter(str(adapter), tmp_path / "out")
    logits = load_file(tmp_path / "out" / "reference_logits.safetensors")["logits"]
    expected = 2 * float(logits[0, 3].abs().max()) if difference is None else difference
    change(logits)
    monkeypatch.setattr(verifying, "_run", lambda folder, output, needs_package: save_file({"logits": logits}, output))
    report = verify_checkpoint(tmp_path / "out")
    assert report.largest_difference == pytest.approx(expected, rel=0.1)
    assert report.num_same_choices == num_same_choices
    assert report.passed == (difference == 1e-5)


def test_logits_of_another_vocabulary_are_refused(tmp_path, adapter, monkeypatch):
    export_adapter(str(adapter), tmp_path / "out")
    other = {"logits": torch.zeros(1, 16, 3)}
    monkeypatch.setattr(verifying, "_run", lambda folder, output, needs_package: save_file(other, output))
    with pytest.raises(ValueError, match=r"logits of the shape \(1, 16, 3\), its reference has \(1, 16, 97\)"):
        verify_checkpoint(tmp_path / "out")


def lose_reference(folder):
    (folder / "reference_logits.safetensors").unlink()


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def lose_tensor(folder):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.parscale.aggregator.0.bias"))


def break_code(folder):
    path = folder / "modeling_parscale.py"
    path.write_text(
        path.read_text().replace("class StreamedModel(", "import no_such_module\n\n\nclass StreamedModel(")
    )


def depend_on_the_package(folder):
    path = folder / "modeling_parscale.py"
    path.write_text(path.read_text().replace("import torch\n", "import torch\nimport parscale_adapt\n", 1))


def empty_reference(folder):
    change_tensors(folder / "reference_logits.safetensors", lambda tensors: tensors.clear())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_reference, "holds no reference_logits.safetensors, so there is nothing to compare with"),
        (truncate_weights, "model.safetensors is truncated or damaged"),
        (lose_tensor, r"does not load in a fresh process: .*'missing_keys': \['model.parscale.aggregator.0.bias'\]"),
        (break_code, "does not load in a fresh process: .*no_such_module"),
        (empty_reference, "is damaged: it lacks the prompt"),
    ],
)
def test_what_can_not_be_compared_is_one_sentence(tmp_path, adapter, damage, message):
    export_adapter(str(adapter), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        verify_checkpoint(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_code_that_needs_the_package_is_found_out(tmp_path, adapter, monkeypatch):
    export_adapter(str(adapter), tmp_path / "out")
    depend_on_the_package(tmp_path / "out")
    root = str(tmp_path / "packages")
    package = tmp_path / "packages" / "parscale_adapt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", root)
    with pytest.raises(ValueError, match="its code imports parscale_adapt"):
        verify_checkpoint(tmp_path / "out")


def count(folder, file="model.safetensors"):
    return sum(tensor.numel() for tensor in load_file(folder / file).values())


def test_an_adapter_is_described_with_shares_of_its_backbone(tmp_path, adapter):
    found = inspect_folder(str(adapter))
    added, whole = count(adapter, "adapter_model.safetensors"), count(tmp_path / "backbone")
    assert (found.kind, found.num_streams, found.num_prefix_tokens) == ("adapter", 4, 3)
    assert (found.backbone, found.carries_backbone) == (str(tmp_path / "backbone"), False)
    assert (found.added_parameters, found.backbone_parameters) == (added, whole)
    assert found.added_percent == pytest.approx(100 * added / whole)
    assert found.added_percent_per_stream == pytest.approx(25 * added / whole)
    assert found.fingerprint["shape"].startswith("{")
    assert len(found.fingerprint) > 1


def test_a_backbone_that_is_not_here_is_not_guessed(tmp_path, adapter):
    (tmp_path / "backbone").rename(tmp_path / "moved")
    assert inspect_folder(str(adapter)).added_percent is None
    assert inspect_folder(str(adapter), str(tmp_path / "moved")).backbone_parameters == count(tmp_path / "moved")


@pytest.mark.parametrize("format", ["standalone", "published"])
def test_an_export_is_described_as_its_adapter(tmp_path, adapter, format):
    export_adapter(str(adapter), tmp_path / "out", format=format, max_shard_size="20KB")
    found, source = inspect_folder(str(tmp_path / "out")), inspect_folder(str(adapter))
    assert found.kind == f"{format} checkpoint"
    assert (found.backbone, found.carries_backbone) == ("qwen2", True)
    assert found.made_by == parscale_adapt.__version__
    same = ("num_streams", "num_prefix_tokens", "stream_transform", "aggregator", "added_parameters", "fingerprint")
    same += ("backbone_parameters", "added_percent_per_stream")
    assert {name: getattr(found, name) for name in same} == {name: getattr(source, name) for name in same}


def test_shared_lora_and_a_carried_backbone_are_counted_apart(tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    with_streams(tiny_model(), 2, lora=lora).save_pretrained(tmp_path / "lora")
    with_streams(tiny_model(), 2, train_backbone=True).save_pretrained(tmp_path / "full")
    with_lora, full = inspect_folder(str(tmp_path / "lora")), inspect_folder(str(tmp_path / "full"))
    assert with_lora.shared_lora_parameters == 2 * 2 * (32 + 32)
    assert with_lora.added_parameters == full.added_parameters
    assert full.backbone_parameters == sum(parameter.numel() for parameter in tiny_model().parameters())


def test_streams_by_other_transforms_are_counted(tmp_path):
    model = with_streams(tiny_model(), 3, stream_transform="bitfit", num_prefix_tokens=48, aggregator="mean")
    model.save_pretrained(tmp_path / "adapter")
    found = inspect_folder(str(tmp_path / "adapter"))
    assert (found.stream_transform, found.num_prefix_tokens, found.aggregator) == ("bitfit", 0, "mean")
    assert found.added_parameters == count(tmp_path / "adapter", "adapter_model.safetensors")


def test_a_published_original_has_no_version_and_a_plain_model_no_streams(tmp_path):
    save_backbone(tmp_path / "backbone")
    published = inspect_folder(str(save_published(tmp_path / "published", tmp_path / "backbone", num_streams=8)))
    assert (published.kind, published.num_streams, published.made_by) == ("published checkpoint", 8, None)
    plain = inspect_folder(str(tmp_path / "backbone"))
    assert (plain.kind, plain.num_streams, plain.added_parameters) == ("plain checkpoint", 1, 0)


def test_an_imported_adapter_that_carries_its_backbone_is_described(tmp_path):
    save_backbone(tmp_path / "backbone")
    published = save_published(tmp_path / "published", tmp_path / "backbone", num_streams=2)
    import_published(str(published), tmp_path / "adapter")
    found = inspect_folder(str(tmp_path / "adapter"))
    assert (found.backbone, found.carries_backbone) == (None, True)
    assert found.backbone_parameters == count(tmp_path / "backbone")


def test_other_folders_are_refused(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text(json.dumps([1]))
    for name, message in {
        "lora": "is no ParScale adapter: its method is LORA",
        "empty": "holds no config.json",
        "list": "config.json is damaged, it holds no JSON object",
        "nowhere": "There is no folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            inspect_folder(str(tmp_path / name))


def test_half_precision_passes_with_a_tolerance_of_its_own(tmp_path):
    save_backbone(tmp_path / "backbone", dtype=torch.bfloat16)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype="auto")
    with_streams(backbone, 2).save_pretrained(tmp_path / "adapter")
    export_adapter(str(tmp_path / "adapter"), tmp_path / "out", format="published")
    report = verify_checkpoint(tmp_path / "out")
    assert report.passed
    logits = load_file(tmp_path / "out" / "reference_logits.safetensors")["logits"]
    assert report.tolerance == pytest.approx(0.05 * float(logits.abs().max()))
