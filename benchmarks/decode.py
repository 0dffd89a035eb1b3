"""Time decoding with P streams against the plain backbone: milliseconds per token, dynamic and static cache.

    python benchmarks/decode.py --json decode.json

Every case reads its prompt first. Then all take turns, token by token, in one process, so that a machine whose speed
changes is no slower for one than for another; the median over the tokens is printed. `parscale cost --measured
decode.json` reads the file.
"""

import argparse
import json
import statistics
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from backbone import build_backbone, random_ids
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from timing import describe_machine, synchronize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from parscale_adapt import ParScaleConfig


CACHES = ("dynamic", "static")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that live inside the block, and their peak."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self.count(tensor)

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return output


@dataclass
class Case:
    """One number of streams with one cache at one context length, and what was measured."""

    num_streams: int
    cache: str
    input_len: int
    memory_gib: float | None = None
    prefill_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        return statistics.median(self.token_seconds)


class Decoding:
    """Greedy decoding of one row: reads the prompt when made, then one more token with every `step`."""

    def __init__(self, model: torch.nn.Module, case: Case, args: argparse.Namespace):
        self.step_model = torch.compile(model) if args.compile and case.cache == "static" else model
        if case.cache == "static":
            self.cache = StaticCache(config=model.config, max_cache_len=case.input_len + args.output_len)
        else:
            self.cache = DynamicCache(config=model.config)
        torch.manual_seed(0)
        prompt = random_ids(argparse.Namespace(**{**vars(args), "seq_len": case.input_len}), num_rows=1)
        self.token = self.forward(model, prompt)

    @torch.no_grad()
    def forward(self, model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        self.token = self.forward(self.step_model, self.token)


def build_model(args: argparse.Namespace, num_streams: int) -> torch.nn.Module:
    if args.model:
        dtype = getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    else:
        model = build_backbone(args)
    if num_streams > 1:
        model = get_peft_model(model, ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams))
    return model.eval()


def decode_all(model: torch.nn.Module, case: Case, args: argparse.Namespace) -> None:
    decoding = Decoding(model, case, args)
    for _ in range(args.output_len - 1):
        decoding.step()


def measure_memory(model: torch.nn.Module, case: Case, args: argparse.Namespace) -> float:
    """Peak memory of one run in GiB: the allocator's on a GPU, elsewhere the tensors that live at the same time."""
    if args.device == "cuda":
        others = torch.cuda.memory_allocated() - sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
        torch.cuda.reset_peak_memory_stats()
        decode_all(model, case, args)
        return (torch.cuda.max_memory_allocated() - others) / 2**30
    with LiveTensors(model) as tensors:
        decode_all(model, case, args)
    return tensors.peak / 2**30


def measure(args: argparse.Namespace) -> list[Case]:
    models = {num_streams: build_model(args, num_streams) for num_streams in (1, *args.streams)}
    cases = [
        Case(num_streams, cache, input_len)
        for input_len in args.contexts
        for cache in CACHES
        for num_streams in models
    ]
    for case in cases:  # also the warm-up
        if case.cache == "dynamic":
            case.memory_gib = measure_memory(models[case.num_streams], case, args)
    decodings = []
    for case in cases:
        start = clock(args.device)
        decodings.append(Decoding(models[case.num_streams], case, args))
        case.prefill_seconds = clock(args.device) - start
        decodings[-1].step()  # the first step may compile
    for _ in range(args.output_len - 2):
        for case, decoding in zip(cases, decodings):
            start = clock(args.device)
            decoding.step()
            case.token_seconds.append(clock(args.device) - start)
    return cases


def clock(device: str) -> float:
    synchronize(device)
    return time.perf_counter()


def show(cases: list[Case], args: argparse.Namespace) -> None:
    table = Table(
        "context",
        "cache",
        "P",
        "ms per token",
        "ratio to the backbone",
        title=f"Decoding at batch 1, {'compiled' if args.compile else 'not compiled'}, {describe_machine(args)}",
    )
    backbone = {(case.cache, case.input_len): case.seconds_per_token for case in cases if case.num_streams == 1}
    for case in cases:
        ratio = case.seconds_per_token / backbone[case.cache, case.input_len]
        name = "backbone" if case.num_streams == 1 else str(case.num_streams)
        table.add_row(str(case.input_len), case.cache, name, f"{1000 * case.seconds_per_token:.2f}", f"{ratio:.2f}")
    Console().print(table)


def as_dict(cases: list[Case], args: argparse.Namespace) -> dict:
    """`rows` holds the cases with a dynamic cache, which `generate` takes by default; `steps` holds all."""
    common = {"batch_size": 1, "output_len": args.output_len}
    rows = [
        {
            **common,
            "num_streams": case.num_streams,
            "input_len": case.input_len,
            "memory_gib": case.memory_gib,
            "latency_seconds": case.prefill_seconds + (args.output_len - 1) * case.seconds_per_token,
        }
        for case in cases
        if case.cache == "dynamic"
    ]
    steps = [
        {
            "num_streams": case.num_streams,
            "cache": case.cache,
            "input_len": case.input_len,
            "ms_per_token": 1000 * case.seconds_per_token,
            "prefill_seconds": case.prefill_seconds,
        }
        for case in cases
    ]
    return {"machine": describe_machine(args), "arguments": vars(args), "rows": rows, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--output_len", type=int, default=64, help="tokens to generate, at least 3")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--model", help="folder of a causal LM, in the place of a random one of the shape above")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the step with the static cache")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--save_config", help="write the backbone's config.json to this folder, for `parscale cost`")
    args = parser.parse_args()

    if args.save_config:
        build_backbone(args).config.save_pretrained(args.save_config)
    cases = measure(args)
    show(cases, args)
    if args.json:
        Path(args.json).write_text(json.dumps(as_dict(cases, args), indent=2))


if __name__ == "__main__":
    main()
