"""What makes a run the run that it is."""

import dataclasses
import json

import pytest

from parscale_adapt.training import BackboneArguments, DataArguments, StreamConfig, StreamGRPOConfig, run_identity
from parscale_adapt.training.identity import MAY_DIFFER
from parscale_adapt.training.run_folder import RunFolder
from parscale_adapt.tuner.config import ParScaleArguments


def identity(tmp_path, streams=None, backbone=None, data=None, **training):
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, **training}
    return run_identity(
        "cpt",
        streams or ParScaleArguments(),
        backbone or BackboneArguments(),
        data or DataArguments(),
        StreamConfig(**settings),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data_seed": 1},
        {"max_steps": 7},
        {"gradient_accumulation_steps": 2},
        {"warmup_steps": 3},
        {"adam_beta1": 0.8},
        {"adam_beta2": 0.95},
        {"adam_epsilon": 1e-6},
        {"max_grad_norm": 0.5},
        {"lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"loss_type": "dft"},
        {"gradient_checkpointing": False},
        {"prefix_learning_rate": 1e-2},
        {"aggregator_learning_rate": 3e-4},
        {"lora_learning_rate": 1e-3},
        {"diversity_weight": 0.1},
        {"streams": ParScaleArguments(num_streams=2)},
        {"backbone": BackboneArguments(model_revision="v2")},
        {"backbone": BackboneArguments(attn_implementation="eager")},
        {"data": DataArguments(shuffle_buffer_size=7)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_setting_that_decides_a_number_is_compared(tmp_path, changes):
    folder = RunFolder(tmp_path / "run", identity(tmp_path))
    folder.open(None)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    other = RunFolder(tmp_path / "run", identity(tmp_path, **changes))
    with pytest.raises(ValueError, match="holds a different run: `"):
        other.open(None)


def test_how_many_streams_run_at_a_time_may_change_between_a_run_and_its_resume(tmp_path):
    chunked = identity(tmp_path, streams=ParScaleArguments(stream_chunk_size=1))
    assert chunked == identity(tmp_path)


def test_what_may_differ_is_listed_and_all_else_is_compared(tmp_path):
    configs = (StreamConfig, StreamGRPOConfig)
    assert {field.name for config in configs for field in dataclasses.fields(config)} >= MAY_DIFFER
    fields = {field.name for field in dataclasses.fields(StreamConfig)}
    assert identity(tmp_path).keys() >= fields - MAY_DIFFER
    assert not identity(tmp_path).keys() & MAY_DIFFER
    assert "hub_token" not in identity(tmp_path, hub_token="secret")


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 3, "report_to": "tensorboard", "run_name": "again"},
        {"save_steps": 7, "save_total_limit": 1},
        {"eval_strategy": "steps", "eval_steps": 7, "per_device_eval_batch_size": 1},
        {"dataloader_num_workers": 2},
        {"output_dir": "elsewhere", "resume_from_checkpoint": "true"},
        {"backbone": BackboneArguments(embedded_dir="elsewhere")},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_decides_no_number_may_differ(tmp_path, changes):
    assert as_stored(identity(tmp_path, **changes)) == as_stored(identity(tmp_path))


def as_stored(settings):
    return json.dumps(settings, default=str, sort_keys=True)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 8},
    ],
    ids=["plateau", "best_model"],
)
def test_evaluation_that_steers_training_is_compared(tmp_path, options):
    options = {**options, "eval_strategy": "steps"}
    assert identity(tmp_path, eval_steps=4, **options) != identity(tmp_path, eval_steps=8, **options)


@pytest.fixture
def files(tmp_path):
    """Training text, held-out text and a tokenizer."""
    names = ("text.jsonl", "other.jsonl", "heldout.jsonl", "backbone/tokenizer.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    return tmp_path


def over(files, **changes):
    """The identity of a mixture of two files."""
    sources = [
        {"path": str(files / name), "weight": weight} for name, weight in (("text.jsonl", 3), ("other.jsonl", 1))
    ]
    data = {"datasets": sources, "heldout_dataset": str(files / "heldout.jsonl"), **changes}
    backbone = BackboneArguments(model_name_or_path=str(files / "backbone"))
    return identity(files, data=DataArguments(**data), backbone=backbone)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("text.jsonl", "text.jsonl"),
        ("other.jsonl", "other.jsonl"),
        ("heldout.jsonl", r"held out: \S+heldout.jsonl"),
        ("backbone/tokenizer.json", "tokenizer: "),
    ],
)
def test_data_that_changed_behind_its_name_is_refused_and_named(files, name, what):
    folder = RunFolder(files / "run", over(files))
    folder.open(None)
    (files / "run" / "checkpoint-1").mkdir()
    (files / "run" / "checkpoint-1" / "verified_save.json").write_text("{}")
    assert RunFolder(files / "run", over(files)).open("true").endswith("checkpoint-1")
    (files / name).write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match=f"the content of .*{what}.* is another now") as raised:
        RunFolder(files / "run", over(files)).open("true")
    assert "(logging, saving, evaluation, the hub and data loader workers may change, all else may not)" in str(
        raised.value
    )


def test_weights_of_a_mixture_are_compared(files):
    before = as_stored(over(files))
    sources = [{"path": str(files / name), "weight": 1} for name in ("text.jsonl", "other.jsonl")]
    assert as_stored(over(files, datasets=sources)) != before


def test_a_hub_out_of_reach_compares_nothing(tmp_path, monkeypatch, capsys):
    answers = iter([None, "a" * 40, "b" * 40])
    monkeypatch.setattr("parscale_adapt.data.fingerprint.hub_commit", lambda source: next(answers))
    data = DataArguments(dataset_name="owner/name")
    RunFolder(tmp_path / "run", identity(tmp_path, data=data)).open(None)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    (tmp_path / "run" / "checkpoint-1" / "verified_save.json").write_text("{}")
    RunFolder(tmp_path / "run", identity(tmp_path, data=data)).open("true")
    assert "out of the hub's reach" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the content of owner/name is another now"):
        RunFolder(tmp_path / "run", identity(tmp_path, data=data)).open("true")
