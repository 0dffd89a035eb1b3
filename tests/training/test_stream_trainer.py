"""What StreamTrainer adds to TRL's trainer: resumes by name or by True, statistics, counts, random numbers left alone."""

import pytest
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, word_tokenizer
from trl import SFTConfig

from parscale_adapt.training import StreamTrainer


pytestmark = pytest.mark.slow


def stream_trainer(folder, num_streams=2, **options):
    """A trainer that trains a backbone with dropout as well, so that random numbers matter."""
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    rows = rows_of_uneven_lengths()
    return StreamTrainer(
        with_streams(tiny_model(attention_dropout=0.3), num_streams, train_backbone=True),
        SFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer):
    return [entry["loss"] for entry in steps(trainer)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints of steps 1 to 4, of which the last was not verified."""
    trainer = stream_trainer(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=False)
    return trainer


def test_true_resumes_from_the_last_verified_checkpoint(whole, tmp_path):
    (tmp_path / "run").symlink_to(whole.args.output_dir)
    mark = tmp_path / "run" / "checkpoint-4" / "verified_save.json"
    content = mark.read_text()
    mark.unlink()
    resumed = stream_trainer(tmp_path / "run")
    trained = []
    resumed.training_step = lambda *args: trained.append(1) or StreamTrainer.training_step(resumed, *args)
    resumed.train(resume_from_checkpoint=True)
    mark.write_text(content)
    assert len(trained) == 1  # of four steps, three were in the checkpoint
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("value", [False, None])
def test_false_and_none_start_anew(whole, tmp_path, value):
    trainer = stream_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=value)
    assert losses(trainer) == losses(whole)


def test_true_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        stream_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_measuring_changes_nothing_of_what_is_trained(whole, tmp_path, options):
    trainer = stream_trainer(tmp_path, **options)
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert losses(trainer) == losses(whole)


def test_one_stream_has_nothing_to_log(tmp_path):
    trainer = stream_trainer(tmp_path, num_streams=1)
    trainer.train()
    assert not any(key.startswith("stream_") for entry in steps(trainer) for key in entry)


@pytest.mark.parametrize("counted", ["no", "all", "non_padding"])
def test_tokens_are_counted_by_trl_or_by_transformers(tmp_path, counted):
    trainer = stream_trainer(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer.args.include_num_input_tokens_seen = counted
    trainer.train()
    lengths = [len(row["input_ids"]) for row in rows_of_uneven_lengths()]
    expected = 8 * max(lengths) if counted == "all" else sum(lengths)
    assert steps(trainer)[0]["num_tokens"] == expected
