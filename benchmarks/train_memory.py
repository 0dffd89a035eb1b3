"""Memory and time of a training step with streams, in chunks and all at once, beside the plain backbone on B and P * B rows.

    python benchmarks/train_memory.py

Every layer is checkpointed in all of them. The peak is that of the tensors that live at the same time in one step, above
weights and optimizer states. The steps take turns in one process; medians of their times are printed.
"""

import argparse
import statistics

import torch
from backbone import build_backbone, random_ids
from decode import LiveTensors
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from timing import describe_machine, seconds

from parscale_adapt import ParScaleConfig


PLAIN, PLAIN_ROWS, CHUNKS, WHOLE = "plain backbone, B rows", "plain backbone, P * B rows", "in chunks", "all at once"
KINDS = (PLAIN, PLAIN_ROWS, CHUNKS, WHOLE)


class Step:
    """A training step, with its peak of memory.

    Args:
        kind: of [`KINDS`].
        train_backbone: whether the backbone is trained.
        args: of the command line.
    """

    def __init__(self, kind: str, train_backbone: bool, args: argparse.Namespace):
        model = build_backbone(args)
        is_plain = kind in (PLAIN, PLAIN_ROWS)
        if not is_plain:
            size = args.chunk_size if kind == CHUNKS else None
            config = ParScaleConfig(
                num_streams=args.num_streams, train_backbone=train_backbone, stream_chunk_size=size
            )
            model = get_peft_model(model, config).train()
        elif not train_backbone:  # gradients flow back to the embeddings, as any adapter needs
            model.requires_grad_(False)
            model.lm_head.register_parameter("probe", torch.nn.Parameter(torch.zeros(1, device=args.device)))
        if not train_backbone:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        num_rows = args.num_streams * args.batch_size if kind == PLAIN_ROWS else args.batch_size
        self.model, self.input_ids = model, random_ids(args, num_rows)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        for parameter in model.parameters():  # so that the optimizer makes its states
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.model(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_mib(self) -> float:
        """Of one step, above weights and optimizer states."""
        tensors = LiveTensors(self.model)
        for state in self.optimizer.state.values():
            for value in state.values():
                tensors.count(value)
        before = tensors.peak = tensors.live
        with tensors:
            self()
        return (tensors.peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_streams", type=int, default=8)
    parser.add_argument("--chunk_size", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; 0 measures the peaks alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    table = Table(
        "training", "step", "peak (MiB)", "of B rows", "time (s)", "of all at once", title=describe_machine(args)
    )
    for train_backbone in (False, True):
        steps = {kind: Step(kind, train_backbone, args) for kind in KINDS}
        peaks = {kind: step.peak_mib() for kind, step in steps.items()}  # also the warm-up
        rounds = [[seconds(step, args.device) for step in steps.values()] for _ in range(args.repeats)]
        times = {kind: statistics.median(column) for kind, column in zip(steps, zip(*rounds))}  # empty without rounds
        for kind in steps:
            table.add_row(
                "full" if train_backbone else "frozen",
                kind,
                f"{peaks[kind]:.0f}",
                f"{peaks[kind] / peaks[PLAIN]:.2f}",
                f"{times[kind]:.2f}" if times else "",
                f"{times[kind] / times[WHOLE]:.2f}" if times else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
