"""The weights of the streams in the logs of trainers that know nothing of streams."""

import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, trainer_of, word_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from parscale_adapt.core.aggregator import Aggregator
from parscale_adapt.core.weight_statistics import stream_statistics
from parscale_adapt.training.stream_statistics import StreamStatisticsCallback
from parscale_adapt.training.trainer import StreamTrainer


NAMES = {"stream_entropy", *(f"stream_{name}/{p}" for name in ("weight", "largest") for p in range(3))}


class Tracker(TrainerCallback):
    """Stands for TensorBoard or trackio: it sees a log when its turn comes."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def aggregator_of(model):
    return next(module for module in model.modules() if isinstance(module, Aggregator))


def preferences():
    words = [f"w{index} w{index + 1}" for index in range(5, 13)]
    rows = [{"prompt": word, "chosen": f" {word} w9 w{i}", "rejected": " w7"} for i, word in enumerate(words)]
    return Dataset.from_list(rows)


def dpo_trainer(model, folder, **options):
    arguments = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    return DPOTrainer(model, args=arguments, train_dataset=preferences(), processing_class=word_tokenizer())


def test_a_dpo_trainer_logs_the_streams_and_its_trackers_see_them(tmp_path):
    trainer = dpo_trainer(with_streams(tiny_model(), 3), tmp_path)
    tracker = Tracker()
    trainer.add_callback(tracker)
    StreamStatisticsCallback.add_to(trainer)
    trainer.train()
    for logs in (trainer.state.log_history, tracker.logs):
        steps = [entry for entry in logs if "loss" in entry]
        assert len(steps) == 2
        for entry in steps:
            assert set(entry) >= NAMES
            assert sum(entry[f"stream_weight/{p}"] for p in range(3)) == pytest.approx(1)
            assert sum(entry[f"stream_largest/{p}"] for p in range(3)) == pytest.approx(1)
        assert not any("stream_entropy" in entry for entry in logs if "loss" not in entry)


def any_trainer(model, folder):
    trainer = trainer_of(model, folder, learning_rate=0.0)
    StreamStatisticsCallback.add_to(trainer)
    return trainer


def stream_trainer(model, folder):
    arguments = trainer_of(model, folder, learning_rate=0.0).args
    return StreamTrainer(model, arguments, train_dataset=rows_of_uneven_lengths(), processing_class=word_tokenizer())


@pytest.mark.parametrize("trainer_with", [any_trainer, stream_trainer])
def test_what_is_logged_is_the_latest_batch_without_its_padding(tmp_path, trainer_with):
    model = with_streams(tiny_model(), 3)
    trainer = trainer_with(model, tmp_path)
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    mask = inputs["attention_mask"] if "attention_mask" in inputs else inputs["labels"] != -100
    lengths = sorted(mask.sum(1).tolist())
    assert lengths == sorted(len(row["input_ids"]) for row in rows_of_uneven_lengths())
    aggregator = aggregator_of(model)
    aggregator.record_weights = True
    with torch.no_grad():
        model(**inputs)
    expected = stream_statistics(aggregator.last_weights, mask)
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in NAMES} == pytest.approx(expected, rel=1e-4)
    assert tracker.logs[0].items() >= {name: logged[name] for name in NAMES}.items()
    assert stream_statistics(aggregator.last_weights) != pytest.approx(expected, rel=1e-3)


def test_it_works_as_an_ordinary_callback_and_leaves_nothing_behind(tmp_path):
    model = with_streams(tiny_model(), 3)
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(StreamStatisticsCallback())
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    trainer.train()
    assert set(trainer.state.log_history[0]) >= NAMES
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert not aggregator_of(model).record_weights


def test_a_model_without_streams_is_refused(tmp_path):
    trainer = trainer_of(with_streams(tiny_model(), 1), tmp_path)
    StreamStatisticsCallback.add_to(trainer)
    with pytest.raises(ValueError, match="no active ParScale adapter with several streams"):
        trainer.train()


@pytest.mark.slow
def test_neither_callback_nor_trainer_needs_plots():
    code = (
        "import sys\n"
        "import parscale_adapt.training.stream_statistics\n"
        "print(sorted({'matplotlib', 'rich', 'trl', 'deepspeed'} & {*sys.modules}))\n"
        "import parscale_adapt.training.trainer\n"
        "print(sorted({'matplotlib', 'deepspeed'} & {*sys.modules}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["[]", "[]"]
