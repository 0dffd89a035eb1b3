"""Warnings of an aggregator that swings or collapses, on sequences of weights and in runs."""

import re
import warnings

import pytest
import torch
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, trainer_of, word_tokenizer

from parscale_adapt.core.aggregator import StaticAggregator
from parscale_adapt.training import StreamConfig, StreamTrainer
from parscale_adapt.training.stream_warnings import SWING, StreamWatch


def warnings_of(weights, smoothing=0.1):
    """What is said of a run whose logs, every ten steps, have these mean weights."""
    watch = StreamWatch(len(weights[0]), smoothing)
    return [message for index, each in enumerate(weights) for message in watch.see(10 * (index + 1), each)]


def test_the_swing_that_was_seen_is_warned_of_once():
    (message,) = warnings_of([(0.46, 0.54), (0.84, 0.16), (0.19, 0.81), (0.84, 0.16)])
    assert message == (
        "The aggregator swings: the streams' mean weights went from 0.46 / 0.54 at step 10 to 0.84 / 0.16 at step 20; lower "
        "the aggregator's learning rate (`--aggregator_learning_rate`)."
    )


def test_a_collapse_is_warned_of_after_three_logs_in_a_row_and_once():
    leaning = (0.02, 0.91, 0.04, 0.03)
    weights = [(0.1, 0.7, 0.1, 0.1), leaning, leaning, (0.1, 0.7, 0.1, 0.1), leaning, leaning]
    assert warnings_of(weights) == []
    (message,) = warnings_of([*weights, leaning, leaning])
    assert "collapsed on stream 1: for 3 logs, up to step 70 with mean weights 0.02 / 0.91 / 0.04 / 0.03" in message
    assert "`--aggregator_learning_rate`" in message


def test_the_threshold_follows_smoothing_and_streams():
    assert len(warnings_of([(0.93, 0.07)] * 3)) == 1
    assert warnings_of([(0.90, 0.10)] * 3) == []
    assert warnings_of([(0.93, 0.07)] * 3, smoothing=0.0) == []  # far from the whole weight
    assert len(warnings_of([(0.73, 0.27)] * 3, smoothing=0.5)) == 1  # of at most 0.75


def test_three_streams_in_turn_are_no_collapse():
    heavy = [tuple(0.96 if stream == turn else 0.02 for stream in range(3)) for turn in range(3)]
    assert not [message for message in warnings_of(heavy) if "collapsed" in message]


def run(folder, aggregator_learning_rate, start=(0.0, 0.0), **options):
    """Mean weights of stream 0 in a run with P=2, and what it warned of."""
    model = with_streams(tiny_model(), aggregator="static", aggregator_smoothing=0.0)
    aggregator = next(module for module in model.modules() if isinstance(module, StaticAggregator))
    aggregator.weight_logits.data.copy_(torch.tensor(start))
    defaults = trainer_of(with_streams(tiny_model()), folder).args
    kept = ("per_device_train_batch_size", "logging_steps", "use_cpu", "bf16", "max_length", "lr_scheduler_type")
    settings = {name: getattr(defaults, name) for name in kept}
    settings |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
    arguments = StreamConfig(
        output_dir=str(folder),
        aggregator_learning_rate=aggregator_learning_rate,
        learning_rate=1e-4,
        **settings,
        **options,
    )
    rows, tokenizer = rows_of_uneven_lengths(), word_tokenizer()
    trainer = StreamTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    weights = [entry["stream_weight/0"] for entry in trainer.state.log_history if "loss" in entry]
    messages = [str(warning.message) for warning in caught]
    return weights, [message for message in messages if message.startswith("The aggregator ")]


def test_a_run_that_swings_warns_and_one_that_does_not_is_quiet(tmp_path):
    weights, messages = run(tmp_path, aggregator_learning_rate=1.5, max_steps=3)
    assert abs(weights[1] - weights[0]) > SWING
    (message,) = messages
    step = re.fullmatch(r".* went from 0\.50 / 0\.50 at step 1 to .* at step (\d); lower .*", message)
    assert step
    assert step[1] == "2"
    weights, messages = run(tmp_path, aggregator_learning_rate=1e-3, max_steps=3)
    assert weights[0] != weights[1]
    assert messages == []


def test_a_run_that_goes_on_with_a_collapsed_aggregator_warns(tmp_path):
    weights, messages = run(tmp_path, 1e-3, start=(-3.0, 3.0), max_steps=4)
    assert max(weights) < 0.01
    (message,) = messages
    assert re.search(r"collapsed on stream 1: for 3 logs, up to step 3 with mean weights 0\.00 / 1\.00", message)


@pytest.mark.parametrize("weights", [[(0.5, 0.5)] * 5, [(0.5, 0.5), (0.75, 0.25), (0.5, 0.5)]])
def test_a_steady_run_says_nothing(weights):
    assert warnings_of(weights) == []
