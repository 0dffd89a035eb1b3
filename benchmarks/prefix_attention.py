"""What a prefix adds to one layer's causal attention in training, and what another way to attend would save.

    python benchmarks/prefix_attention.py

Forward and backward of one layer for P * B rows: the plain backbone's keys alone; ours, with the prefix in front of the keys and
as many zero queries in front of the queries; and two calls, over the prefix and over the keys, joined by their sums of
exponentials, which copies nothing but asks for torch's private operators. They take turns; medians are printed.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


forward_operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class JoinedAttention(torch.autograd.Function):
    """Of `query` `[R, heads, T, d]` over a prefix `[R, key_value_heads, n, d]` and, causally, over `key` and `value`."""

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value):
        behind, behind_sum = forward_operator(query, key, value, 0.0, True)
        before, before_sum = forward_operator(query, prefix_key, prefix_value, 0.0, False)
        log_sum = torch.logaddexp(behind_sum, before_sum)
        output = torch.lerp(behind, before, (before_sum - log_sum).exp().unsqueeze(-1))
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, output, log_sum)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, prefix_key, prefix_value, output, log_sum = ctx.saved_tensors
        behind = backward_operator(grad, query, key, value, output, log_sum, 0.0, True)
        before = backward_operator(grad, query, prefix_key, prefix_value, output, log_sum, 0.0, False)
        return behind[0].add_(before[0]), *behind[1:], *before[1:]


def plain(query, key, value, prefix_key, prefix_value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def padded(query, key, value, prefix_key, prefix_value):
    """As `parscale_adapt.hf.prefixed_attention` does it, with a sample's streams among the heads."""
    num_prefix_tokens, num_streams = prefix_key.shape[-2], len(prefix_key)

    def by_sample(states):
        return states.unflatten(0, (num_streams, -1)).transpose(0, 1)

    keys, values = (
        torch.cat([prefix[None].expand(len(states), *prefix.shape), states], dim=-2).flatten(1, 2)
        for prefix, states in ((prefix_key, by_sample(key)), (prefix_value, by_sample(value)))
    )
    queries = F.pad(by_sample(query), (0, 0, num_prefix_tokens, 0)).flatten(1, 2)
    output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    output = output[:, :, num_prefix_tokens:].unflatten(1, (num_streams, -1))
    return output.transpose(0, 1).flatten(0, 1).transpose(1, 2).contiguous()


def joined(query, key, value, prefix_key, prefix_value):
    batch_size = len(query) // len(prefix_key)
    prefixes = (prefix.repeat_interleave(batch_size, dim=0) for prefix in (prefix_key, prefix_value))
    return JoinedAttention.apply(query, key, value, *prefixes).transpose(1, 2)


def random_inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    """Query, key and value of all rows, and keys and values of each stream's prefix."""
    torch.manual_seed(0)
    rows = args.num_streams * args.batch_size
    of_tokens = [
        torch.randn(rows, args.seq_len, heads, args.head_size)
        for heads in (args.num_heads, *[args.num_key_value_heads] * 2)
    ]
    of_prefixes = [
        torch.randn(args.num_streams, args.num_key_value_heads, args.num_prefix_tokens, args.head_size)
        for _ in range(2)
    ]
    inputs = [states.transpose(1, 2) for states in of_tokens] + of_prefixes
    return [states.requires_grad_() for states in inputs]


def step(attend, inputs: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output = attend(*inputs)
    wanted = inputs[:3] if attend is plain else inputs
    return output, *torch.autograd.grad(output, wanted, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_streams", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_key_value_heads", type=int, default=2)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--num_prefix_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    inputs = random_inputs(args)
    grad = torch.randn_like(plain(*inputs))
    for ours, other in zip(step(padded, inputs, grad), step(joined, inputs, grad)):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    times: dict = {plain: [], padded: [], joined: []}
    for repeat in range(args.repeats + 2):
        for attend, seconds in times.items():
            begun = time.perf_counter()
            step(attend, inputs, grad)
            if repeat >= 2:
                seconds.append(time.perf_counter() - begun)
    table = Table("one layer, forward and backward", "ms", "more than plain (ms)")
    names = {plain: "keys alone", padded: "prefix in front of the keys", joined: "two calls, joined"}
    medians = {attend: 1000 * statistics.median(seconds) for attend, seconds in times.items()}
    for attend, name in names.items():
        table.add_row(name, f"{medians[attend]:.1f}", f"{medians[attend] - medians[plain]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
