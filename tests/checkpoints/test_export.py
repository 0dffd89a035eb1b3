"""Exports: what each format holds, what is refused, and that a failed one leaves nothing."""

import json
import pathlib
import threading
import time

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from support.outputs import logits
from support.published_checkpoints import change_tensors
from support.tiny_models import tiny_model, with_streams
from support.tiny_tasks import in_streams
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from parscale_adapt.checkpoints import exporting
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.data import train_tokenizer


pytestmark = pytest.mark.slow


LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def save_source(root, model_type="qwen2", num_streams=2, dtype=torch.float32, **fields):
    """A backbone and an adapter that names it; returns the adapter's folder."""
    root.mkdir(exist_ok=True)
    tiny_model(model_type, tie_word_embeddings=True).to(dtype).save_pretrained(root / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(root / "backbone", dtype="auto")
    model = with_streams(backbone, num_streams, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # also matrices that start at zero
                parameter += 0.1
    model.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.fixture
def adapter(tmp_path):
    return save_source(tmp_path / "source")


def source_logits(adapter):
    backbone = AutoModelForCausalLM.from_pretrained(adapter.parent / "backbone", dtype="auto")
    return logits(PeftModel.from_pretrained(backbone, adapter))


@pytest.mark.parametrize("fields", [{}, {"lora": LORA}, {"train_backbone": True}, {"modules_to_save": ["norm"]}])
def test_the_published_export_computes_the_same(tmp_path, fields):
    adapter = save_source(tmp_path / "source", **fields)
    report = export_adapter(str(adapter), tmp_path / "out", format="published")
    assert (report.num_streams, report.dtype) == (2, "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Qwen2ParScaleForCausalLM"
    torch.testing.assert_close(logits(model), source_logits(adapter), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{"train_backbone": True}, {"lora": LORA}])
@pytest.mark.parametrize("format", ["standalone", "published"])
def test_one_stream_is_the_plain_backbone_with_what_was_trained(tmp_path, fields, format):
    adapter = save_source(tmp_path / "source", num_streams=1, **fields)
    export_adapter(str(adapter), tmp_path / "out", format=format)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert (type(model) is Qwen2ForCausalLM) == (format == "standalone")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(adapter.parent / "backbone" / "model.safetensors").keys()
    )
    torch.testing.assert_close(logits(model), source_logits(adapter), atol=1e-5, rtol=0)


def test_an_adapter_of_another_task_is_refused(tmp_path):
    in_streams("SEQ_CLS").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is for SEQ_CLS, and this is for causal LMs alone: load it with PEFT"):
        export_adapter(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_backbone_can_be_named(tmp_path, adapter):
    (adapter.parent / "backbone").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="There is no folder"):
        export_adapter(str(adapter), tmp_path / "out")
    export_adapter(str(adapter), tmp_path / "out", backbone=str(tmp_path / "moved"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("format", ["standalone", "published"])
def test_dtype_changes_the_weights_and_says_so(tmp_path, adapter, format):
    report = export_adapter(str(adapter), tmp_path / "out", format=format, dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.dtype == config["dtype" if format == "standalone" else "torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ours = ("parscale", "prefix", "aggregate")
    of_backbone = {tensor.dtype for name, tensor in tensors.items() if not any(part in name for part in ours)}
    of_streams = {tensor.dtype for name, tensor in tensors.items() if any(part in name for part in ours)}
    assert of_backbone == {torch.bfloat16}
    assert of_streams == {torch.float32 if format == "standalone" else torch.bfloat16}


REFUSED = [
    ({"format": "gguf"}, "can't be exported to gguf: GGUF has no place for streams"),
    ({"format": "vllm"}, "can't be exported to vllm: vLLM serves standalone exports as they are"),
    ({"format": "onnx"}, "`format` must be one of standalone, published, got 'onnx'"),
    ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
    ({"max_shard_size": "2 gigabytes"}, "`max_shard_size` must be a number and a unit, such as 2GB"),
    ({"max_shard_size": "0GB"}, "`max_shard_size` must be a number and a unit, such as 2GB"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_can_not_be_made_is_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_adapter("no-such-folder", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {}, "must be a Qwen2 in the published layout, got one of the type 'llama'"),
        (
            "qwen2",
            {"stream_transform": "bitfit", "num_prefix_tokens": 48},
            "`stream_transform` must be 'prefix' in the published layout, got 'bitfit'",
        ),
        ("qwen2", {"aggregator": "static"}, "`aggregator` must be 'dynamic' in the published layout, got 'static'"),
    ],
)
def test_the_published_layout_refuses_what_it_has_no_place_for(tmp_path, model_type, fields, message):
    adapter = save_source(tmp_path / "source", model_type, **fields)
    with pytest.raises(ValueError, match=message):
        export_adapter(str(adapter), tmp_path / "out", format="published")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_published_layout_refuses_a_configuration_that_it_has_no_words_for(tmp_path, adapter):
    path = adapter.parent / "backbone" / "config.json"
    config = json.loads(path.read_text())
    config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    path.write_text(json.dumps(config | {"layer_types": ["sliding_attention", "full_attention"]}))
    with pytest.raises(ValueError, match=r"can't say that `layer_types` is \['sliding_attention', 'full_attention'\]"):
        export_adapter(str(adapter), tmp_path / "out", format="published")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-64])


def pickle_only(path):
    path.rename(path.with_suffix(".bin"))


def drop_a_tensor(path):
    change_tensors(path, lambda tensors: tensors.pop(sorted(tensors)[-1]))


def cut_a_tensor(path):
    def change(tensors):
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name][:-1].clone()

    change_tensors(path, change)


def other_values(path):
    change_tensors(path, lambda tensors: tensors["model.embed_tokens.weight"].neg_())


ADAPTER, BACKBONE = "adapter/adapter_model.safetensors", "backbone/model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (ADAPTER, truncate, "adapter_model.safetensors is truncated or damaged"),
        (ADAPTER, pickle_only, r"holds its weights as a pickle \(adapter_model.bin\)"),
        (ADAPTER, drop_a_tensor, "missing: .*parscale_aggregator"),
        (ADAPTER, cut_a_tensor, "of wrong shape: .*parscale_aggregator"),
        (BACKBONE, truncate, "model.safetensors is truncated or damaged"),
        (BACKBONE, pickle_only, r"holds its weights as a pickle \(model.bin\)"),
        (BACKBONE, drop_a_tensor, "is incomplete: it lacks 1 tensors, first model.norm.weight"),
        (BACKBONE, cut_a_tensor, r"does not fit its config.json, model.norm.weight is \(31,\) instead of \(32,\)"),
        (BACKBONE, other_values, "The adapter was trained on another backbone than this Qwen2ForCausalLM"),
    ],
)
def test_damaged_input_is_one_sentence_and_leaves_nothing(tmp_path, adapter, file, damage, message):
    damage(adapter.parent / file)
    with pytest.raises(ValueError, match=message) as error:
        export_adapter(str(adapter), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wrong_kinds_of_input_are_told_apart(tmp_path, adapter):
    export_adapter(str(adapter), tmp_path / "out")
    backbone = str(adapter.parent / "backbone")
    refused = {
        (backbone, None): "must hold a ParScale adapter, got a plain checkpoint",
        (
            str(adapter),
            str(tmp_path / "out"),
        ): "must be a plain checkpoint, got .*, a standalone checkpoint with streams of its own: give",
        (str(adapter), str(tmp_path / "nowhere")): "can't be opened, give it with --backbone: There is no folder",
    }
    for (source, plain), message in refused.items():
        with pytest.raises(ValueError, match=message):
            export_adapter(source, tmp_path / "other", plain)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes, message in (
        ({"base_model_name_or_path": None}, "names no backbone: give one with --backbone"),
        ({"peft_type": "LORA"}, "must hold a ParScale adapter, got one of the method LORA"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            export_adapter(str(adapter), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_with_contents_is_left_alone(tmp_path, adapter):
    (tmp_path / "out").mkdir()
    export_adapter(str(adapter), tmp_path / "out")  # an empty one is filled
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export_adapter(str(adapter), tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_crash_while_writing_leaves_nothing(tmp_path, adapter, monkeypatch):
    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr(exporting, "write_reference", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export_adapter(str(adapter), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", ["standalone", "published"])
def test_what_was_written_is_read_back(tmp_path, adapter, monkeypatch, format):
    def damage_instead(reference, folder):
        def change(tensors):
            tensors["model.norm.weight"][0] += 1e-3

        change_tensors(folder / "model.safetensors", change)

    monkeypatch.setattr(exporting, "write_reference", damage_instead)
    with pytest.raises(ValueError, match=r"What was written is not what was exported, model\.norm\.weight differs"):
        export_adapter(str(adapter), tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


TEXT = "two streams are mixed, <|im_start|>two streams<|im_end|>"


@pytest.mark.parametrize("place", ["adapter", "backbone"])
def test_the_tokenizer_comes_along(tmp_path, adapter, place):
    trained = train_tokenizer([TEXT] * 4, vocab_size=265)
    trained.chat_template = "{{ messages }}"
    trained.save_pretrained(adapter.parent / place)
    export_adapter(str(adapter), tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(adapter.parent / place)
    assert expected(TEXT).input_ids == trained(TEXT).input_ids
    for options in ({"trust_remote_code": True}, {"trust_remote_code": False}):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
        assert tokenizer(TEXT).input_ids == trained(TEXT).input_ids
        assert tokenizer.chat_template == "{{ messages }}"
        assert len(tokenizer) == 265


@pytest.mark.parametrize(("format", "custom_code"), [("standalone", True), ("published", None)])
def test_the_card_has_what_the_hub_reads(tmp_path, adapter, format, custom_code):
    export_adapter(str(adapter), tmp_path / "out", format=format)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.to_dict().get("custom_code") == custom_code
    assert card.data.base_model is None  # a folder is no repository
    assert "arxiv:2505.10475" in card.data.tags
    assert ("trust_remote_code=True" in card.text) == (format == "standalone")
    first_lines = " ".join(card.text.split("\n\n")[1].split())
    assert first_lines.startswith(
        {"standalone": "Load it with `trust_remote", "published": "Import `parscale_adapt`"}[format]
    )


def test_a_backbone_from_the_hub_is_named_in_the_card():
    data = exporting.export_card("Qwen/Qwen2.5-3B", "standalone", 8).data
    assert data.base_model == "Qwen/Qwen2.5-3B"


class MemoryWatch:
    """The largest amount of memory of this process that is not mapped from files, in bytes."""

    def __enter__(self):
        self.peak, self._stop = self.now(), False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop = True
        self._thread.join()

    def _watch(self):
        while not self._stop:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)

    @staticmethod
    def now():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


SIZES = {"hidden_size": 512, "intermediate_size": 2048}
# Many layers in single precision, and a vocabulary that would take 134 MB in float64.
LARGE = [(torch.float32, {"num_hidden_layers": 8, "vocab_size": 4096}), (torch.bfloat16, {"vocab_size": 32768})]


@pytest.mark.parametrize(("dtype", "sizes"), LARGE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["standalone", "published"])
def test_an_export_holds_a_shard_and_the_adapter_and_not_the_model(tmp_path, adapter, format, dtype, sizes):
    if not pathlib.Path("/proc/self/status").is_file():
        pytest.skip("reads the memory of this process from /proc, which only Linux has")
    name = str(dtype).removeprefix("torch.")
    export_adapter(str(adapter), tmp_path / "warm", format=format, dtype=name)  # imports and pools
    backbone = tiny_model("qwen2", **SIZES, **sizes).to(dtype)
    backbone.save_pretrained(tmp_path / "large" / "backbone", max_shard_size="20MB")
    del backbone
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large" / "backbone", dtype="auto")
    with_streams(loaded, 2).save_pretrained(tmp_path / "large" / "adapter")
    del loaded
    model_size = sum(path.stat().st_size for path in (tmp_path / "large" / "backbone").glob("*.safetensors"))
    assert model_size > {torch.float32: 120e6, torch.bfloat16: 80e6}[dtype]
    with MemoryWatch() as memory:
        start = memory.now()
        export_adapter(str(tmp_path / "large" / "adapter"), tmp_path / "out", format=format, max_shard_size="20MB")
    # A shard (or one tensor, if it is larger), the adapter of 6 MB, a block of a matrix, and what the allocator keeps.
    assert memory.peak - start < 60e6
