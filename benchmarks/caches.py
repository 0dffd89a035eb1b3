"""What caches of fewer bits save and what they cost in accuracy: bytes, and the loss of real text read behind a cache.

    python benchmarks/caches.py --model FOLDER --num_streams 4

The first tokens of a text fill the cache, the others follow in short pieces, as drafts or users' turns do, and each
attends to what the cache gives back. Without `--text` it is Python's language reference, from the standard library.
A backend that isn't installed (hqq, optimum-quanto) is said and left out. The streams are untrained and start from tokens
of the backbone, so that they read as it does.
"""

import argparse
import json
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from timing import describe_machine
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedConfig, QuantizedCache

from parscale_adapt import ParScaleConfig


CACHES: dict[str, dict[str, Any] | None] = {
    "dynamic": None,
    "fp8": {"backend": "fp8"},
    "hqq, 8 bit": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq, 4 bit": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "quanto, 4 bit": {"backend": "quanto", "nbits": 4},
}


def new_cache(config: PreTrainedConfig, options: dict[str, Any] | None) -> Cache:
    """A cache of one of [`CACHES`]; ImportError if its backend isn't installed."""
    return DynamicCache(config=config) if options is None else QuantizedCache(config=config, **options)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All plain tensors inside, such as the parts of quantized ones."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def cache_bytes(cache: Cache) -> int:
    """Of all tensors that its layers hold."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(vars(layer)))


@torch.no_grad()
def loss_behind_cache(model: torch.nn.Module, ids: torch.Tensor, cache: Cache, args: argparse.Namespace) -> float:
    """Nats per token of `ids` `[1, T]` behind the first `args.prompt_len`."""
    pieces = [ids[:, : args.prompt_len], *ids[:, args.prompt_len : -1].split(args.piece_len, dim=1)]
    logits = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    log_probabilities = torch.cat([logits[0][:, -1:], *logits[1:]], dim=1).float().log_softmax(-1)
    return F.nll_loss(log_probabilities[0], ids[0, args.prompt_len :]).item()


def measure(args: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.num_streams > 1:
        torch.manual_seed(0)
        model = get_peft_model(model, ParScaleConfig(num_streams=args.num_streams, init_weights="tokens"))
    model.eval()
    text = Path(args.text).read_text() if args.text else "\n".join(pydoc_data.topics.topics.values())
    length = args.prompt_len + args.num_scored
    ids = tokenizer(text[: 20 * length], return_tensors="pt").input_ids[:, :length].to(args.device)
    rows = []
    for name, options in CACHES.items():
        try:
            cache = new_cache(model.config, options)
        except ImportError as error:
            rows.append({"cache": name, "missing": str(error).splitlines()[0]})
            continue
        loss = loss_behind_cache(model, ids, cache, args)
        rows.append({"cache": name, "bytes": cache_bytes(cache), "loss": loss})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, such as that of scripts/smollm2.py")
    parser.add_argument("--text", help="file of text")
    parser.add_argument("--num_streams", type=int, default=4)
    parser.add_argument("--prompt_len", type=int, default=512)
    parser.add_argument("--num_scored", type=int, default=512)
    parser.add_argument("--piece_len", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    rows = measure(args)
    table = Table("cache", "MiB", "of dynamic", "nats per token", "more", title=describe_machine(args))
    whole = rows[0]
    for row in rows:
        if "missing" in row:
            table.add_row(row["cache"], row["missing"])
            continue
        share, more = row["bytes"] / whole["bytes"], row["loss"] - whole["loss"]
        table.add_row(
            row["cache"], f"{row['bytes'] / 2**20:.2f}", f"{share:.2f}", f"{row['loss']:.4f}", f"{more:+.4f}"
        )
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": describe_machine(args), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
