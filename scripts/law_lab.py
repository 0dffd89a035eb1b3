"""The scaling law in the small: tiny models trained from scratch in P streams on Python source, and the fit.

    python scripts/law_lab.py --processes 2                 # on two cores, one model on each; resumable
    python scripts/law_lab.py --device cuda --processes 6   # a few minutes on one GPU
    parscale fit-law docs/evidence/law_lab.csv --plot law.png

Every model reads the same 2 million tokens once, in the same order: source of the packages that this project
installs, licence headers and generated files dropped. Each (size, P) is a row of the CSV, written when it has been
trained; finished rows are skipped. Backbone, prefixes and aggregator start from normal distributions and are trained
together, as in the paper.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from evidence_corpus import installed, package_sources
from evidence_rows import DIVERGED, FINISHED, Table, shared_columns
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.analysis.diagnostics import diagnose
from parscale_adapt.data.tokenizer_training import END_TOKEN, train_tokenizer
from parscale_adapt.files import write_atomically


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers", "torch", "scipy", "numpy", "trl", "datasets", "matplotlib", "huggingface_hub", "pandas")
HELDOUT_PACKAGES = ("peft", "accelerate", "deepspeed")
VOCAB_SIZE = 1024
TEXT_TOKENS = 4_000_000
TRAIN_TOKENS = 2_000_000  # the first ones
HELDOUT_TOKENS = 2**17
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
# Peak learning rate times the hidden size. On the first 400,000 tokens, width 160 ended at 5.00, 4.75, 4.85 and 5.06 for
# 1e-3, 2e-3, 5e-3 and 1e-2; on 800,000, width 96 at 4.39 and 4.45 for 3e-3 and 1e-2.
PEAK_RATE_BY_WIDTH = 0.32
LAST_RATE_SHARE, WARMUP_STEPS = 0.1, 100
# With the paper's 48, prefixes would double the smallest model; fit-law counts them as parameters.
NUM_PREFIX_TOKENS = 8
STREAMS = (1, 2, 4, 8)
DIAGNOSED_ROWS = 64
COLUMNS = (
    "size", "num_streams", "status", "num_params", "backbone_params", "loss", "own_loss", "averaged_loss", "rho", "tokens",
    "seconds", "data", "machine", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Shape of a Llama; its layers have `12 * hidden_size ** 2` weights each."""

    hidden_size: int
    num_layers: int
    num_heads: int


SIZES = {"0.1M": Size(64, 2, 4), "0.2M": Size(80, 3, 4), "0.5M": Size(112, 3, 4)}


@dataclass(frozen=True)
class Text:
    """Token ids `[N]` of both splits, and the sha256 of them all."""

    train: torch.Tensor
    heldout: torch.Tensor
    fingerprint: str


def load_text(file: Path) -> Text:
    """Read the tokens from `file`, which is written first if it isn't there."""
    if not file.is_file():
        _write_text(file)
    with safe_open(file, framework="pt") as opened:
        train, heldout = opened.get_tensor("train"), opened.get_tensor("heldout")
    digest = hashlib.sha256(train.numpy().tobytes() + heldout.numpy().tobytes())
    return Text(train, heldout, digest.hexdigest()[:12])


def _write_text(file: Path) -> None:
    texts = list(package_sources(PACKAGES))
    tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 1500)], VOCAB_SIZE)
    end = tokenizer.convert_tokens_to_ids(END_TOKEN)

    def tokens(texts: list[str], wanted: int) -> torch.Tensor:
        ids: list[int] = []
        for first in range(0, len(texts), 64):
            for row in tokenizer(texts[first : first + 64])["input_ids"]:
                ids += [*row, end]
            if len(ids) >= wanted:
                return torch.tensor(ids[:wanted], dtype=torch.int16)
        raise ValueError(f"The installed packages give only {len(ids):,} of {wanted:,} tokens.")

    tensors = {
        "train": tokens(texts, TEXT_TOKENS),
        "heldout": tokens(list(package_sources(HELDOUT_PACKAGES)), HELDOUT_TOKENS),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    versions = " ".join(f"{name} {installed(name).version}" for name in (*PACKAGES, *HELDOUT_PACKAGES))
    write_atomically(file, lambda temporary: save_file(tensors, temporary, metadata={"versions": versions}))


def build(size: Size, num_streams: int) -> nn.Module:
    """A model with new weights, the same backbone for every P."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=SEQUENCE_LENGTH,
        initializer_range=0.6 / math.sqrt(size.hidden_size),  # what 0.02 is at the paper's width
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if num_streams == 1:
        return model
    return get_peft_model(
        model, ParScaleConfig(num_streams=num_streams, num_prefix_tokens=NUM_PREFIX_TOKENS, train_backbone=True)
    )


def train_row(name: str, num_streams: int, file: Path, device: str) -> dict[str, object]:
    """Train one model and measure it: a row of the table."""
    torch.set_num_threads(1)  # models as small as these gain more by --processes
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    text = load_text(file)
    model = build(SIZES[name], num_streams).to(device).train()
    embeddings = SIZES[name].hidden_size * VOCAB_SIZE
    num_params = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    begun = time.monotonic()
    _train(model, text.train[:TRAIN_TOKENS], device)
    seconds = time.monotonic() - begun
    loss = _heldout_loss(model, text.heldout, device)
    return {
        "size": name,
        "num_streams": num_streams,
        "status": FINISHED if math.isfinite(loss) else f"{DIVERGED}: the loss is {loss}",
        "num_params": num_params,
        "backbone_params": sum(parameter.numel() for parameter in build(SIZES[name], 1).parameters()) - embeddings,
        "loss": loss,
        **(_stream_losses(model, text.heldout, device) if num_streams > 1 else {}),
        "tokens": TRAIN_TOKENS // (BATCH_SIZE * SEQUENCE_LENGTH) * BATCH_SIZE * SEQUENCE_LENGTH,
        "seconds": round(seconds, 1),
    }


def _train(model: nn.Module, tokens: torch.Tensor, device: str) -> None:
    batches = tokens.view(-1)[: len(tokens) // (BATCH_SIZE * SEQUENCE_LENGTH) * BATCH_SIZE * SEQUENCE_LENGTH]
    batches = batches.view(-1, BATCH_SIZE, SEQUENCE_LENGTH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = PEAK_RATE_BY_WIDTH / model.config.hidden_size
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        share = (step - WARMUP_STEPS) / max(1, len(batches) - WARMUP_STEPS)
        return LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * (1 + math.cos(math.pi * share)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for ids in batches:
        ids = ids.to(device).long()
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@torch.no_grad()
def _heldout_loss(model: nn.Module, tokens: torch.Tensor, device: str) -> float:
    model.eval()
    rows = tokens.view(-1, SEQUENCE_LENGTH).long()
    losses = [model(input_ids=ids.to(device), labels=ids.to(device)).loss.double() for ids in rows.split(BATCH_SIZE)]
    return torch.stack(losses).mean().item()


def _stream_losses(model: nn.Module, tokens: torch.Tensor, device: str) -> dict[str, object]:
    rows = tokens.view(-1, SEQUENCE_LENGTH).long()[:DIAGNOSED_ROWS].to(device)
    found = diagnose(model, [{"input_ids": ids, "labels": ids} for ids in rows.split(8)])
    return {
        "own_loss": sum(found.own_loss) / len(found.own_loss),
        "averaged_loss": found.averaged_prediction_loss,
        "rho": found.rho,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="models at a time")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "evidence" / "law_lab.csv")
    parser.add_argument("--text", type=Path, default=ROOT / "runs" / "evidence" / "law_lab.safetensors")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but torch sees no GPU here: leave it out.")
    text = load_text(arguments.text)
    shared = shared_columns(text.fingerprint, torch.device(arguments.device))
    table = Table(arguments.csv, shared, COLUMNS, ("size", "num_streams"))
    todo = [(name, count) for count in STREAMS for name in SIZES if not table.has(name, count)]
    print(f"{len(table.rows)} rows are there, {len(todo)} to run", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        running = [pool.submit(train_row, name, count, arguments.text, arguments.device) for name, count in todo]
        for future in as_completed(running):
            row = future.result()
            table.add(row)
            print(f"{row['size']} P={row['num_streams']}: {row['status']} {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
