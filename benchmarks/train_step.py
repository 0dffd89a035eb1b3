"""Time a ParScale training step against a step of the plain backbone on a batch of P * B rows.

    python benchmarks/train_step.py

Both see the same tokens per stream and run interleaved in one process; the ratio of the medians is printed. The frozen
baseline is the plain backbone with frozen weights and gradients flowing back to its embeddings, as any adapter needs.
"""

import argparse
import platform
import statistics
import time

import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from parscale_adapt import ParScaleConfig


def build_backbone(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Random weights; `intermediate_size` and `num_heads` may be left out, as scripts for small shapes do."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=getattr(args, "intermediate_size", None) or args.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=args.num_layers,
        num_attention_heads=getattr(args, "num_heads", None) or args.hidden_size // 64,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)).train()


def make_step(model: torch.nn.Module, input_ids: torch.Tensor):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(args: argparse.Namespace, num_streams: int, train_backbone: bool):
    model = build_backbone(args)
    if not train_backbone:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        model.lm_head.register_parameter("probe", torch.nn.Parameter(torch.zeros(1, device=args.device)))
    return make_step(model, random_ids(args, num_streams * args.batch_size))


def parscale_step(args: argparse.Namespace, num_streams: int, train_backbone: bool):
    config = ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, train_backbone=train_backbone)
    return make_step(get_peft_model(build_backbone(args), config), random_ids(args, args.batch_size))


def random_ids(args: argparse.Namespace, num_rows: int) -> torch.Tensor:
    return torch.randint(args.vocab_size, (num_rows, args.seq_len), device=args.device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def describe_machine(args: argparse.Namespace) -> str:
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {args.dtype} on {args.device}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    table = Table(
        "training",
        "P",
        "plain on P*B rows (s)",
        "ParScale on B rows (s)",
        "ratio",
        title=describe_machine(args),
    )
    for train_backbone in (False, True):
        for num_streams in args.streams:
            steps = [build(args, num_streams, train_backbone) for build in (plain_step, parscale_step)]
            for step in steps:
                step()
            times = [[seconds(step, args.device) for step in steps] for _ in range(args.repeats)]
            plain, parscale = (statistics.median(column) for column in zip(*times))
            table.add_row(
                "full" if train_backbone else "frozen",
                str(num_streams),
                f"{plain:.3f}",
                f"{parscale:.3f}",
                f"{parscale / plain:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
