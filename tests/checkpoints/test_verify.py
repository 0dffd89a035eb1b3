"""`verify` finds what is wrong with an export, and nothing wrong with one that is right."""

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published_checkpoints import change_tensors
from support.tiny_models import tiny_model, with_streams
from transformers import AutoModelForCausalLM

import parscale_adapt
from parscale_adapt.checkpoints import fresh_process, verifying
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.checkpoints.fresh_process import compute_logits
from parscale_adapt.checkpoints.reference import make_prompts, read_reference
from parscale_adapt.checkpoints.verifying import verify_checkpoint


pytestmark = pytest.mark.slow


OLD_EXPORTS = pathlib.Path(__file__).parents[1] / "regression" / "0.1.0"
NUM_POSITIONS = 3 + (3 + 3 + 2) + (3 + 3)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def save_adapter(root, model_type="qwen2", dtype=FLOAT32, num_streams=4, **fields):
    """A backbone and an adapter all of whose tensors matter, at every prompt; returns the adapter's folder."""
    tiny_model(model_type).to(dtype).save_pretrained(root / "backbone")
    model = with_streams(AutoModelForCausalLM.from_pretrained(root / "backbone"), num_streams, **fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # also what starts at zero, such as the aggregator's biases
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if "parscale_aggregator" in name:
                parameter *= 0.2  # so that no stream takes all the weight
    model.save_pretrained(root / "adapter")
    return root / "adapter"


def compute_here(folder, output, needs_package):
    """As `verifying._run`, without a process of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not needs_package, dtype="auto").eval()
    save_file(fresh_process.compute_as_asked(model, load_file(folder / "reference_logits.safetensors")), output)


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(verifying, "_run", compute_here)


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(tmp_path)


ARCHITECTURES = ("qwen2", "llama", "gemma3_text", "qwen3_moe")
SOURCES = [(model_type, dtype) for model_type in ARCHITECTURES for dtype in (FLOAT32, BFLOAT16)]


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: f"{source[0]}-{str(source[1])[6:]}")
def export(request, tmp_path_factory):
    model_type, dtype = request.param
    root = tmp_path_factory.mktemp(model_type)
    export_adapter(str(save_adapter(root, model_type, dtype)), root / "out")
    return root / "out"


@pytest.mark.parametrize("dtype", [None, FLOAT32])
def test_what_kernels_and_batches_compute_apart_is_within_the_tolerance(export, dtype):
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype="auto").eval()
    reference = read_reference(export)
    tolerances = reference.tolerances
    tolerance = tolerances["logits"] if dtype is None else tolerances.get("logits_float32", tolerances["logits"])
    for batch in fresh_process.split_batches(reference.tensors).values():
        expected = compute_logits(model, batch, dtype).float()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        alone = [
            {"input_ids": input_ids[None, visible], "compared": compared[None, visible]}
            for input_ids, compared, visible in zip(batch["input_ids"], batch["compared"], mask)
        ]
        by_row = torch.cat([compute_logits(model, row, dtype).float() for row in alone])
        assert (by_row - expected).abs().max() < tolerance
        model.set_attn_implementation("eager")
        assert (compute_logits(model, batch, dtype).float() - expected).abs().max() < tolerance
        model.set_attn_implementation("sdpa")


def prefix_names(tensors, layer=""):
    return [name for name in tensors if f"layers.{layer}" in name and ".parscale.prefix_" in name]


def zero_one_prefix(tensors):
    names = prefix_names(tensors, "1.")
    for name in names:
        tensors[name][2] = 0
    return names


def exchange_prefixes_of_one_layer(tensors):
    names = prefix_names(tensors, "0.")
    for name in names:
        tensors[name] = tensors[name][[1, 0, 2, 3]]
    return names


def exchange_prefixes(tensors):
    names = prefix_names(tensors)
    for name in names:
        tensors[name] = tensors[name][[0, 3, 2, 1]]
    return names


def drop_a_bias(tensors):
    names = ["model.parscale.aggregator.0.bias"]
    tensors[names[0]].zero_()
    return names


def drop_another_bias(tensors):
    names = ["model.parscale.aggregator.2.bias"]
    tensors[names[0]].zero_()
    return names


FAULTS = (zero_one_prefix, exchange_prefixes_of_one_layer, exchange_prefixes, drop_a_bias, drop_another_bias)


def float32_comparison(report):
    return next(comparison for comparison in report.comparisons if comparison.dtype == "float32")


def test_an_export_passes(export, in_this_process):
    report = verify_checkpoint(export)
    assert report.passed
    assert (report.num_stream_tensors, report.changed_tensors) == (2 * 2 + 4, [])
    assert {comparison.num_tokens for comparison in report.comparisons} == {NUM_POSITIONS}
    assert float32_comparison(report).tolerance < 5e-4
    config = json.loads((export / "config.json").read_text())
    assert [comparison.dtype for comparison in report.comparisons] == list(dict.fromkeys([config["dtype"], "float32"]))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_the_tensors_and_in_the_logits_of_every_prompt(export, tmp_path, in_this_process, fault):
    folder, changed = shutil.copytree(export, tmp_path / "out"), []
    change_tensors(folder / "model.safetensors", lambda tensors: changed.extend(fault(tensors)))
    report = verify_checkpoint(folder)
    assert not report.passed
    assert sorted(report.changed_tensors) == sorted(changed)
    assert not float32_comparison(report).passed
    # Each prompt alone would have been enough.
    tolerance, expected = float32_comparison(report).tolerance, read_reference(folder).tensors
    compute_here(folder, tmp_path / "found", needs_package=False)
    name = "logits_float32" if "logits_float32" in expected else "logits"
    found = load_file(tmp_path / "found")
    for batch in ("", "short.", "long."):
        off = (found[batch + name] - expected[batch + name]).abs().amax(-1)
        rows = expected[f"{batch}compared"].nonzero()[:, 0]
        assert all(off[rows == row].max() > 10 * tolerance for row in rows.unique())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return self.prefix_k(dtype, chunk), self", "return self.prefix_k(dtype, chunk) * 0, self"),
        ("return self.aggregator(hidden_states)", "return self.aggregator(hidden_states.roll(1, 0))"),
    ],
    ids=["prefix keys", "order of streams"],
)
def test_a_fault_in_the_code_is_found_in_the_logits(tmp_path, in_this_process, dtype, right, wrong):
    export_adapter(str(save_adapter(tmp_path, dtype=dtype)), tmp_path / "out")
    code = (tmp_path / "out" / "modeling_parscale.py").read_text()
    assert code.count(right) == 1
    (tmp_path / "out" / "modeling_parscale.py").write_text(code.replace(right, wrong))
    report = verify_checkpoint(tmp_path / "out")
    assert report.changed_tensors == []
    assert not float32_comparison(report).passed


LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("format", "fields"),
    [
        ("published", {}),
        ("published", {"lora": LORA}),
        ("standalone", {"lora": LORA}),
        ("standalone", {"num_streams": 1, "lora": LORA}),
        ("standalone", {"train_backbone": True}),
        ("standalone", {"modules_to_save": ["norm"]}),
        ("standalone", {"stream_transform": "lora", "num_prefix_tokens": 48, "aggregator": "static"}),
        ("standalone", {"stream_transform": "bitfit", "num_prefix_tokens": 48, "aggregator": "mean"}),
        ("standalone", {"init_weights": "reparameterized"}),
        ("standalone", {"stream_transform": ["prefix", "lora"], "lora": LORA}),
    ],
)
def test_every_kind_of_adapter_passes(tmp_path, in_this_process, dtype, format, fields):
    export_adapter(str(save_adapter(tmp_path, dtype=dtype, **fields)), tmp_path / "out", format=format)
    report = verify_checkpoint(tmp_path / "out")
    assert report.passed
    assert (report.num_stream_tensors == 0) == (fields.get("num_streams") == 1)


def test_the_published_layout_in_half_precision_is_checked_as_sharply(tmp_path, in_this_process):
    export_adapter(str(save_adapter(tmp_path)), tmp_path / "out", format="published", dtype="bfloat16")
    assert float32_comparison(verify_checkpoint(tmp_path / "out")).tolerance < 5e-4

    def change(tensors):
        tensors["model.layers.0.self_attn.prefix_v"][0, 0, 0, 0] += 1

    change_tensors(tmp_path / "out" / "model.safetensors", change)
    report = verify_checkpoint(tmp_path / "out")
    assert report.changed_tensors == ["model.layers.0.self_attn.prefix_v"]
    assert not float32_comparison(report).passed


@pytest.mark.parametrize("name", ["standalone", "published"])
def test_exports_of_the_first_version_are_verified_as_it_did(tmp_path, in_this_process, name):
    folder = shutil.copytree(OLD_EXPORTS / name / "export", tmp_path / name)
    report = verify_checkpoint(folder)
    assert report.passed
    assert (report.made_by, report.num_stream_tensors) == ("0.1.0", None)
    assert [(comparison.dtype, comparison.num_tokens) for comparison in report.comparisons] == [("float32", 16)]
    change_tensors(folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert not verify_checkpoint(folder).passed


@pytest.mark.slow
@pytest.mark.parametrize("format", ["standalone", "published"])
def test_a_fresh_process_computes_the_logits(tmp_path, adapter, format):
    export_adapter(str(adapter), tmp_path / "out", format=format, dtype="bfloat16")
    report = verify_checkpoint(tmp_path / "out")
    assert report.passed
    assert report.made_by == parscale_adapt.__version__
    assert all(comparison.num_same_choices == NUM_POSITIONS for comparison in report.comparisons)


def test_a_reference_belongs_to_the_numbers_of_its_source(tmp_path):
    adapter = save_adapter(tmp_path)
    change_tensors(tmp_path / "backbone" / "model.safetensors", lambda tensors: tensors["lm_head.weight"].mul_(1e6))
    with pytest.raises(
        ValueError, match=r"`dtype` must be one that holds the numbers of this model, got torch.float16"
    ):
        export_adapter(str(adapter), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_prompts_have_several_lengths_with_and_without_padding():
    batches = fresh_process.split_batches(make_prompts(97))
    assert [sorted(batch) for batch in batches.values()] == [
        ["compared", "input_ids"],
        ["attention_mask", "compared", "input_ids"],
        ["attention_mask", "compared", "input_ids"],
    ]
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches.values() if "attention_mask" in batch]
    assert lengths == [[7, 4, 2], [20, 9]]
    for batch in batches.values():
        visible = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert visible[batch["compared"]].all()
        assert visible[:, -1].all()
        assert (batch["input_ids"][~visible] == 0).all()


@pytest.mark.parametrize(
    ("change", "difference", "num_same_choices"),
    [
        (lambda logits: logits.add_(1e-6), 1e-6, NUM_POSITIONS),
        (lambda logits: logits[2].neg_(), None, NUM_POSITIONS - 1),
        (lambda logits: logits[2].fill_(float("nan")), float("inf"), NUM_POSITIONS - 1),
    ],
)
def test_differences_are_measured(tmp_path, adapter, monkeypatch, change, difference, num_same_choices):
    export_adapter(str(adapter), tmp_path / "out")
    logits = load_file(tmp_path / "out" / "reference_logits.safetensors")
    expected = 2 * float(logits["short.logits"][2].abs().max()) if difference is None else difference
    change(logits["short.logits"])
    monkeypatch.setattr(verifying, "_run", lambda folder, output, needs_package: save_file(logits, output))
    report = verify_checkpoint(tmp_path / "out")
    (comparison,) = report.comparisons
    assert comparison.largest_difference == pytest.approx(expected, rel=0.2)
    assert comparison.num_same_choices == num_same_choices
    assert report.passed == (difference == 1e-6)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["passed"] == report.passed
    assert (written["comparisons"][0]["largest_difference"] is None) == (difference == float("inf"))


def test_logits_of_another_vocabulary_are_refused(tmp_path, adapter, monkeypatch):
    export_adapter(str(adapter), tmp_path / "out")
    other = {f"{batch}logits": torch.zeros(3, 5) for batch in ("", "short.", "long.")}
    monkeypatch.setattr(verifying, "_run", lambda folder, output, needs_package: save_file(other, output))
    with pytest.raises(ValueError, match=r"logits of the shape \(3, 5\) where its reference has \(3, 97\)"):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_reference, "holds no reference_logits.safetensors, so there is nothing to compare with"),
        (truncate_weights, "model.safetensors is truncated or damaged"),
        (lose_tensor, r"does not load in a fresh process: .*'missing_keys': \['model.parscale.aggregator.0.bias'\]"),
        (break_code, "does not load in a fresh process: .*no_such_module"),
        (empty_reference, "is damaged, it lacks the prompts"),
    ],
)
def test_what_can_not_be_compared_is_one_sentence(tmp_path, adapter, damage, message):
    export_adapter(str(adapter), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        verify_checkpoint(tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.slow
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
