"""`inspect`: kinds, streams and counts, from small files and headers alone."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.published_checkpoints import save_backbone, save_published
from support.tiny_models import tiny_model, with_streams
from transformers import AutoModelForCausalLM

import parscale_adapt
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.checkpoints.headers import TensorHeaders
from parscale_adapt.checkpoints.importing import import_published
from parscale_adapt.checkpoints.inspection import inspect_folder


@pytest.fixture
def adapter(tmp_path):
    save_backbone(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    with_streams(backbone, 4).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


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


@pytest.mark.parametrize(
    ("transform", "num_prefix_tokens"), [("bitfit", 0), (["prefix", "lora"], 48), (["lora", "bitfit"], 0)]
)
def test_streams_by_other_transforms_are_counted(tmp_path, transform, num_prefix_tokens):
    model = with_streams(tiny_model(), 3, stream_transform=transform, num_prefix_tokens=48, aggregator="mean")
    model.save_pretrained(tmp_path / "adapter")
    found = inspect_folder(str(tmp_path / "adapter"))
    assert (found.stream_transform, found.num_prefix_tokens) == (transform, num_prefix_tokens)
    assert found.aggregator == "mean"
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
        "lora": "must hold a ParScale adapter, got one of the method LORA",
        "empty": "holds no config.json",
        "list": "config.json is damaged, it holds no JSON object",
        "nowhere": "There is no folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            inspect_folder(str(tmp_path / name))


def test_fields_that_are_missing_are_named(tmp_path, adapter):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    del fields["aggregator"]
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is damaged, it lacks 'aggregator' of its streams"):
        inspect_folder(str(adapter))


READER = """
import sys
from parscale_adapt.cli import app
for folder in sys.argv[1:]:
    app(["inspect", folder], standalone_mode=False)
print("loaded:", *{name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "safetensors"})
"""


def test_headers_are_read_without_torch(tmp_path, adapter):
    published = save_published(tmp_path / "published", tmp_path / "backbone", num_streams=2)
    export_adapter(str(adapter), tmp_path / "export")
    command = [sys.executable, "-c", READER, adapter, tmp_path / "export", published]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("kind ")]
    assert kinds == ["adapter", "standalone checkpoint", "published checkpoint"]
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_headers_say_what_is_in_a_file(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.bfloat16),
        "a": torch.ones(4, dtype=torch.int64),
        "c": torch.ones(()),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"made_by": "hand"})
    headers = TensorHeaders(tmp_path)
    assert headers.shapes == {"a": (4,), "b": (2, 3), "c": ()}
    assert headers.dtypes == {"a": "I64", "b": "BF16", "c": "F32"}
    assert headers.metadata == {"made_by": "hand"}
    assert headers.count_values(["a", "b", "c"]) == 11


def no_header(data):
    return b""


def longer_header(data):
    return (len(data)).to_bytes(8, "little") + data[8:]


def cut_tensor(data):
    return data[:-1]


def one_byte_more(data):
    return data + b"\0"


def other_text(data):
    return data[:8] + b"x" * (len(data) - 8)


def a_list(data):
    return (2).to_bytes(8, "little") + b"[]"


def no_offsets(data):
    return data.replace(b"data_offsets", b"date_offsets")


def a_gap(data):
    return data.replace(b"[0,4]", b"[1,4]")


@pytest.mark.parametrize(
    "damage", [no_header, longer_header, cut_tensor, one_byte_more, other_text, a_list, no_offsets, a_gap]
)
def test_a_damaged_header_is_one_sentence(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or damaged .*: copy or download it again\.$"
    ):
        TensorHeaders(tmp_path)
