"""The embedded backbone: a small Qwen2 and its tokenizer, pretrained once on the standard library's source (stage 1).

Kept under the hash of everything that decides its weights. Training runs in a process of its own, so that a recipe
launched on several processes, or under DeepSpeed, finds an ordinary checkpoint.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data import (
    LoadedSource,
    MixtureSettings,
    PackedCollator,
    build_train_dataset,
    corpus_fingerprint,
    load_stdlib_corpus,
    pack_dataset,
    train_tokenizer,
)
from ..data.packing import IGNORED_LABEL
from .saving import replacing_folder


NUM_HELDOUT_ROWS = 128


@dataclass(frozen=True)
class EmbeddedBackbone:
    """Size and schedule of the embedded backbone."""

    vocab_size: int = 1024
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 2
    num_key_value_heads: int = 1
    max_length: int = 256
    batch_size: int = 16
    num_steps: int = 750
    learning_rate: float = 5e-3
    seed: int = 0

    def content_hash(self) -> str:
        """Changes with any setting and with any byte of the corpus."""
        settings = json.dumps(asdict(self), sort_keys=True)
        corpus = corpus_fingerprint(load_stdlib_corpus()["train"]["text"])
        return hashlib.sha256(f"{settings}{corpus}".encode()).hexdigest()[:12]


def embedded_backbone(parent: str | Path, settings: EmbeddedBackbone | None = None) -> Path:
    """The folder of the embedded backbone below `parent`; pretrains it if it is not there yet.

    Every rank may call it; one trains, the others wait.
    """
    settings = settings or EmbeddedBackbone()
    folder = Path(parent) / f"backbone-{settings.content_hash()}"
    with PartialState().main_process_first():
        if not (folder / "model.safetensors").is_file():
            print(f"No pretrained backbone given: pretraining a small one into {folder} (once).", flush=True)
            run_alone("parscale_adapt.training.embedded", str(folder), json.dumps(asdict(settings)))
    return folder


def run_alone(module: str, *arguments: str) -> None:
    """Run a module in a process of its own, which no launcher of this one reaches.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = {key: value for key, value in os.environ.items() if not _belongs_to_launcher(key)}
    subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=True)


def _belongs_to_launcher(name: str) -> bool:
    return name.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_", "TORCHELASTIC_")) or name in {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
    }


def pretrain(folder: Path, settings: EmbeddedBackbone) -> None:
    """Train tokenizer and backbone and write both to `folder`."""
    corpus = load_stdlib_corpus()["train"]
    tokenizer = train_tokenizer(corpus["text"], settings.vocab_size)
    rows = _rows(corpus, tokenizer, settings)
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(_model_config(settings, tokenizer))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_training_arguments(scratch, settings),
            train_dataset=rows,
            data_collator=PackedCollator(tokenizer.pad_token_id),
        )
        trainer.train()
    heldout = pack_dataset(load_stdlib_corpus()["heldout"], tokenizer, settings.max_length)
    heldout_loss = token_loss(model, heldout.select(range(NUM_HELDOUT_ROWS)), tokenizer, settings.batch_size)
    with replacing_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        record = {
            "heldout_loss": heldout_loss,
            "settings": asdict(settings),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        (staging / "embedded.json").write_text(json.dumps(record, indent=2))


@torch.no_grad()
def token_loss(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
    """Mean loss per trained token over packed rows, in nats."""
    model.eval()
    total, count = 0.0, 0
    for inputs in DataLoader(rows, batch_size=batch_size, collate_fn=PackedCollator(tokenizer.pad_token_id)):
        labels = inputs["labels"].to(model.device)
        output = model(
            input_ids=inputs["input_ids"].to(model.device),
            position_ids=inputs["position_ids"].to(model.device),
            labels=labels,
            use_cache=False,
        )
        num_targets = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total += output.loss.item() * num_targets
        count += num_targets
    return total / count


def _rows(corpus: Dataset, tokenizer: PreTrainedTokenizerBase, settings: EmbeddedBackbone) -> Dataset:
    num_rows = settings.num_steps * settings.batch_size
    source = LoadedSource("standard library", corpus)
    mixture = MixtureSettings(settings.max_length, settings.seed, max_rows=num_rows)
    return build_train_dataset([source], tokenizer, mixture)[0]


def _model_config(settings: EmbeddedBackbone, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _training_arguments(scratch: str, settings: EmbeddedBackbone) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.num_steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, settings.num_steps // 10),
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
    )


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]), EmbeddedBackbone(**json.loads(sys.argv[2])))
