"""What a machine can do, measured, and what a forward pass of a shape needs of it at the least."""

import statistics
import time
from typing import NamedTuple

import torch
from timing import synchronize
from transformers import PreTrainedConfig


class Limits(NamedTuple):
    """Rates of a machine in one dtype: floating point operations of matrix products, and bytes read and written by a
    copy, per second."""

    flops: float
    bandwidth: float


class Work(NamedTuple):
    """Operations and bytes of one part of a forward pass."""

    flops: float
    num_bytes: float

    def seconds(self, limits: Limits) -> float:
        return max(self.flops / limits.flops, self.num_bytes / limits.bandwidth)


def measure_limits(device: str, dtype: torch.dtype, repeats: int = 7) -> Limits:
    """Medians of products of square matrices and of copies that no cache of the CPU holds."""
    size, num_bytes = (8192, 2**31) if device == "cuda" else (2048, 2**28)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _median_seconds(lambda: left @ right, device, repeats)
    copy = _median_seconds(lambda: target.copy_(source), device, repeats)
    return Limits(2 * size**3 / product, 2 * num_bytes / copy)


def _median_seconds(run, device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first is the warm-up


class ForwardPass(NamedTuple):
    """What runs.

    Args:
        num_streams: `P`.
        batch_size: `B`.
        num_tokens: new ones of each sample.
        num_cached: those before them.
        num_head_tokens: for how many of the new ones the LM head runs; None for all.
        num_prefix_tokens: of each stream; a single stream has none.
    """

    num_streams: int
    batch_size: int
    num_tokens: int
    num_cached: int = 0
    num_head_tokens: int | None = None
    num_prefix_tokens: int = 48


def forward_work(config: PreTrainedConfig, itemsize: int, run: ForwardPass) -> list[Work]:
    """The parts of a forward pass of a gated decoder such as Qwen2, in numbers of `itemsize` bytes.

    Weights and the cache are read once; activations are taken to stay in the processor's caches.
    """
    num_streams, batch_size, num_tokens, num_cached, num_head_tokens, num_prefix_tokens = run
    hidden, num_layers, size = (
        config.hidden_size,
        config.num_hidden_layers,
        config.hidden_size // config.num_attention_heads,
    )
    query, key_value = config.num_attention_heads * size, config.num_key_value_heads * size
    rows = num_streams * batch_size * num_tokens
    weights = num_layers * (2 * hidden * query + 2 * hidden * key_value + 3 * hidden * config.intermediate_size)
    prefix = num_prefix_tokens if num_streams > 1 else 0
    seen = prefix + num_cached + (num_tokens + 1) / 2
    cached = num_streams * (batch_size * (num_cached + num_tokens) + prefix)
    head_rows = batch_size * (num_tokens if num_head_tokens is None else num_head_tokens)
    work = [
        Work(2 * weights * rows, weights * itemsize),
        Work(4 * rows * seen * query * num_layers, 2 * cached * key_value * num_layers * itemsize),
        Work(2 * config.vocab_size * hidden * head_rows, config.vocab_size * hidden * itemsize),
    ]
    if num_streams > 1:
        aggregator = num_streams * hidden * (hidden + 1)
        work.append(Work(2 * aggregator * batch_size * num_tokens, aggregator * itemsize))
    return work


def plain_rows_work(config: PreTrainedConfig, itemsize: int, run: ForwardPass) -> list[Work]:
    """The parts of a forward pass of the plain backbone on P * B rows, of which B go to the LM head, beside `run`."""
    return forward_work(config, itemsize, run._replace(num_prefix_tokens=0))[:3]  # and no aggregator


def seconds_at_limit(work: list[Work], limits: Limits) -> float:
    """The parts run one after the other."""
    return sum(part.seconds(limits) for part in work)
