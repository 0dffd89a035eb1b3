"""Where a recipe's arguments lead: the data, the adapter that is trained on, and how what goes wrong is reported."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, word_tokenizer
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from parscale_adapt import ParScaleConfig
from parscale_adapt.data import TextSource
from parscale_adapt.training import (
    BackboneArguments,
    DataArguments,
    RecipeParser,
    StreamTrainer,
    check_run,
    finish_run,
    run_recipe,
    train,
    trainable_model,
)
from parscale_adapt.tuner.config import ParScaleArguments


pytestmark = pytest.mark.slow


def test_one_source_or_a_mixture():
    assert DataArguments().sources() == []
    one = DataArguments(dataset_name="a.jsonl", text_field="code", streaming=True)
    assert one.sources() == [TextSource("a.jsonl", text_field="code", streaming=True)]
    mixture = DataArguments(datasets=[{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 2}])
    assert [source.weight for source in mixture.sources()] == [1, 2]
    with pytest.raises(ValueError, match="Give either `dataset_name` or `datasets`"):
        DataArguments(dataset_name="a", datasets=[{"path": "b"}])


def test_held_out_text_is_all_of_a_local_file_and_the_test_split_of_the_hub(material):
    assert DataArguments().heldout_source() is None
    assert DataArguments(heldout_dataset=material.heldout).heldout_source().split == "train"
    assert DataArguments(heldout_dataset="owner/name").heldout_source().split == "test"
    assert DataArguments(heldout_dataset="owner/name", heldout_split="dev").heldout_source().split == "dev"


ADAPTERS = {
    "num_streams": {"num_streams": 2},
    "stream_transform": {"stream_transform": "bitfit"},
    "num_prefix_tokens": {"num_prefix_tokens": 5},
    "stream_lora_rank": {"stream_transform": "lora", "stream_lora_rank": 4},
    "stream_lora_alpha": {"stream_transform": "lora", "stream_lora_alpha": 8.0},
    "aggregator": {"aggregator": "mean"},
    "aggregator_smoothing": {"aggregator_smoothing": 0.2},
    "init_std": {"init_std": 0.1},
    "init_weights": {"init_weights": "tokens"},
    "lora": {"lora": {"r": 2, "target_modules": ["q_proj"]}},
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ParScaleArguments)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_default_that_was_given_is_refused_where_the_adapter_differs(material, tmp_path, name):
    ParScaleConfig(**ADAPTERS[name]).save_pretrained(tmp_path)
    backbone = BackboneArguments(adapter_name_or_path=str(tmp_path))
    backbone.explicit_settings = frozenset({name})
    stored = ParScaleConfig(**ADAPTERS[name]).to_dict()[name]
    with pytest.raises(
        ValueError, match=rf"`{name}` is {DEFAULTS[name]!r}, but .* was trained with {re.escape(repr(stored))}"
    ):
        trainable_model(material.backbone, backbone, ParScaleArguments())


def test_every_setting_of_the_streams_is_compared_but_for_what_is_trained_further():
    assert DEFAULTS.keys() - ADAPTERS.keys() == {"train_backbone", "stream_chunk_size"}


@pytest.mark.parametrize("given", [{}, {"num_streams": 2}], ids=["left_out", "the_same"])
def test_streams_are_those_of_the_adapter(material, tmp_path, given):
    with_streams(tiny_model(vocab_size=320), 2).save_pretrained(tmp_path)
    backbone = BackboneArguments(adapter_name_or_path=str(tmp_path), verify_backbone=False)
    backbone.explicit_settings = frozenset(given)
    streams = ParScaleArguments(**given, stream_chunk_size=1)
    with pytest.warns(UserWarning, match="trained on another backbone"):
        model, _ = trainable_model(material.backbone, backbone, streams)
    assert (streams.num_streams, streams.num_prefix_tokens) == (2, 3)
    assert model.get_base_model().model.parscale.chunk_size == streams.stream_chunk_size == 1
    assert model.peft_config["default"].num_streams == 2


def test_another_backbone_is_refused_unless_told_so(material, tmp_path):
    with_streams(tiny_model(vocab_size=320), 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another backbone"):
        trainable_model(material.backbone, BackboneArguments(adapter_name_or_path=str(tmp_path)), ParScaleArguments())
    training = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"`verify_backbone=False` .* but no adapter is named"):
        check_run(ParScaleArguments(), BackboneArguments(verify_backbone=False), training)


@dataclasses.dataclass
class Arguments:
    number: int = 0


def stopped(main, arguments=()):
    with pytest.raises(SystemExit) as stop:
        run_recipe(main, RecipeParser((Arguments,)), arguments)
    assert stop.value.code == 1


@pytest.mark.parametrize(
    "arguments", [["--number", "x"], ["--num", "1"], ["--other", "1"], ["--config", "missing.yaml"], ["--number", "3"]]
)
def test_every_wrong_argument_is_one_line(capsys, arguments):
    def main(parsed):
        raise ValueError(f"number is {parsed.number},\n  which is wrong")

    stopped(main, arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_the_traceback_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("PARSCALE_TRACEBACK", "1")

    def main(parsed):
        raise ValueError("a wrong number")

    stopped(main)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: a wrong number"


def test_other_errors_keep_their_traceback():
    def main(parsed):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_recipe(main, RecipeParser((Arguments,)), [])


class Failing(TrainerCallback):
    """Raises when a step begins."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def trainer_in(folder, **options):
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=1,
        save_steps=1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    rows = rows_of_uneven_lengths()
    return StreamTrainer(
        with_streams(tiny_model()), arguments, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer()
    )


ERRORS = [TypeError("unsupported operand"), OSError(28, "No space left on device"), RuntimeError("a bug")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_after_the_first_step_shows_where_it_was_and_what_is_left(tmp_path, capsys, error):
    trainer = trainer_in(tmp_path / "run")
    trainer.add_callback(Failing(3, error))
    stopped(lambda parsed: train(trainer, None), ["--number", "3"])
    lines = capsys.readouterr().err.splitlines()
    assert lines.index("Traceback (most recent call last):") < len(lines) - 1
    assert any("on_step_begin" in line for line in lines)
    assert lines[-1].startswith(f"error: training stopped after step 3 by {type(error).__name__}: {error}; ")
    assert f"the last verified checkpoint is {tmp_path / 'run' / 'checkpoint-3'}; go on with: " in lines[-1]
    assert lines[-1].endswith(" --number 3 --resume_from_checkpoint true")


def test_without_a_checkpoint_there_is_none_to_go_on_from(tmp_path, capsys):
    trainer = trainer_in(tmp_path / "run", save_strategy="no")
    trainer.add_callback(Failing(1, TypeError("a bug")))
    stopped(lambda parsed: train(trainer, None))
    assert capsys.readouterr().err.splitlines()[-1].endswith("TypeError: a bug; no checkpoint was saved")


def test_an_error_before_the_first_step_is_one_line(tmp_path, capsys):
    trainer = trainer_in(tmp_path / "run")
    trainer.add_callback(Failing(0, OSError("no such file")))
    capsys.readouterr()
    stopped(lambda parsed: train(trainer, None))
    assert capsys.readouterr().err.splitlines() == ["error: no such file"]


@pytest.mark.parametrize(("strategy", "num_saves"), [("no", 1), ("steps", 2)])
def test_a_disk_without_room_is_known_before_the_first_step(tmp_path, monkeypatch, strategy, num_saves):
    trainer = trainer_in(tmp_path)
    trainer.args.save_strategy = SaveStrategy(strategy)
    needed = num_saves * sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    monkeypatch.setattr(trainer, "train", lambda **kwargs: None)
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    train(trainer, None)
    free -= 1
    with pytest.raises(ValueError, match=rf"takes at least .* to save {num_saves}x, but .* make room"):
        train(trainer, None)


def test_a_model_that_can_not_be_saved_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    trainer = trainer_in(tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def main(parsed):
        train(trainer, None)
        monkeypatch.setattr(trainer.model, "save_pretrained", full)
        finish_run(trainer, ParScaleArguments(num_streams=2), {"backbone": "tiny", "data": ["rows"]})

    stopped(main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be written to" in last
    assert "(No space left on device; " in last
    assert "; the last verified checkpoint is" in last
    assert "checkpoint-4; go on with: " in last
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "part",
    [
        "parscale_adapt.training.trainer.StreamTrainer.heldout_loss",
        "parscale_adapt.training.plots.plot_curve",
        "parscale_adapt.training.report.write_card",
    ],
)
def test_what_was_trained_is_saved_before_anything_else_is_tried(tmp_path, capsys, monkeypatch, part):
    trainer = trainer_in(tmp_path / "run")
    folder = tmp_path / "run"

    def fail(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(part, fail)

    def main(parsed):
        train(trainer, None)
        capsys.readouterr()
        finish_run(trainer, ParScaleArguments(num_streams=2), {"backbone": "tiny", "data": ["rows"]})

    stopped(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: the trained model lies in {folder}, saved and verified, but it could not be measured and described: "
        "ZeroDivisionError: division by zero"
    )
    assert (folder / "verified_save.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    saved, checkpoint = (load_file(path / "adapter_model.safetensors") for path in (folder, folder / "checkpoint-4"))
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoint.items())
