"""A killed and resumed run of the stock Trainer: the same batches, losses and weights, bit for bit."""

import hashlib
import json

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from parscale_adapt.data import LoadedSource, MixtureSettings, PackedCollator, TextSource, build_train_dataset


pytestmark = pytest.mark.slow


NUM_STEPS = 8
# So long that a map-style epoch is over before the checkpoint, and the run resumes within its second epoch.
MAX_LENGTH = 320
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class RecordingTrainer(Trainer):
    """The stock Trainer; it only writes down a hash of each batch it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for shard in range(3):
        lines = [json.dumps({"text": make_text(shard * 100 + index)}) for index in range(60)]
        (path / f"{shard}.jsonl").write_text("\n".join(lines))
    return path


def make_text(number):
    return " ".join(WORDS[int(digit)] for digit in str(number**3)) + f" {number}"


def sources(kind, folder):
    memory = Dataset.from_dict({"text": [make_text(number) for number in range(1000, 1100)]})
    if kind == "map-style":
        return [TextSource(str(folder)), LoadedSource("memory", memory)]
    streaming = kind == "streaming"
    return [TextSource(str(folder), weight=2, streaming=streaming), LoadedSource("memory", memory, 1)]


def make_trainer(kind, folder, tokenizer, output_dir, num_workers):
    """Everything anew, as in a new process: data, model (other random weights), trainer."""
    torch.manual_seed(len(str(output_dir)))
    config = Qwen2Config(
        vocab_size=275,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.1,
    )
    dataset, _ = build_train_dataset(
        sources(kind, folder), tokenizer, MixtureSettings(MAX_LENGTH, seed=5, shuffle_buffer_size=20)
    )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        save_steps=NUM_STEPS // 2,
        logging_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        dataloader_num_workers=num_workers,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return RecordingTrainer(
        model=Qwen2ForCausalLM(config),
        args=arguments,
        train_dataset=dataset,
        data_collator=PackedCollator(0),
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("map-style", 0), ("weighted", 0), ("streaming", 0), ("streaming", 2), ("weighted", 2)]
)
def test_resumed_run_repeats_the_uninterrupted_one(kind, num_workers, folder, tokenizer, tmp_path):
    whole = make_trainer(kind, folder, tokenizer, tmp_path / "whole", num_workers)
    whole.train()
    resumed = make_trainer(kind, folder, tokenizer, tmp_path / "resumed again", num_workers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{NUM_STEPS // 2}"))

    assert len(set(whole.seen)) == len(whole.seen)
    assert len(whole.seen) // 3 < len(resumed.seen) < len(whole.seen)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    if kind == "map-style":
        assert whole.state.epoch > 2
    assert len(losses(whole)) == NUM_STEPS
    assert losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    for name, values in resumed.model.state_dict().items():
        assert torch.equal(values, expected[name]), name
