"""Time a training step of P streams against one of the plain backbone on P * B rows, with B rows at the LM head of both.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --hidden_size 1536 --intermediate_size 8960 --num_heads 12

The second has layers of the shape of Qwen2.5-1.5B. Both steps are run by one model, in turn, each first in every other
round. The frozen plain backbone has gradients flowing back to its embeddings, as any adapter needs. The last column is the
ratio of the arithmetic alone: each query looks at the prefix, too, and the aggregator is one more part.
"""

import argparse
import statistics

from limits import ForwardPass, forward_work, plain_rows_work
from rich.console import Console
from rich.table import Table
from timing import describe_machine
from train_cases import PLAIN, STREAMS, TrainCase, build_config, ignore_warnings, measure_times


COLUMNS = ("training", "P", "plain backbone, P * B rows (s)", "streams (s)", "of plain", "by arithmetic")


def arithmetic_ratio(args: argparse.Namespace, num_streams: int) -> float:
    """Operations of a forward pass of P streams, by those of the plain backbone on P * B rows."""
    config, run = build_config(args), ForwardPass(num_streams, args.batch_size, args.seq_len)
    plain, streams = (sum(part.flops for part in work(config, 1, run)) for work in (plain_rows_work, forward_work))
    return streams / plain


def cells(plain: TrainCase, streams: TrainCase, by_arithmetic: float) -> list[str]:
    """One row of the table: medians with the lowest and highest, and the ratio of the medians."""
    times = [
        f"{statistics.median(case.times):.3f} ({min(case.times):.3f} to {max(case.times):.3f})"
        for case in (plain, streams)
    ]
    ratio = statistics.median(streams.times) / statistics.median(plain.times)
    return [
        "full" if streams.is_full else "frozen",
        str(streams.num_streams),
        *times,
        f"{ratio:.3f}",
        f"{by_arithmetic:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, help="8/3 of the hidden size by default")
    parser.add_argument("--num_heads", type=int, help="heads of size 64 by default")
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--train_repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    ignore_warnings()

    table = Table(*COLUMNS, title=describe_machine(args))
    for is_full in (False, True):
        for num_streams in args.streams:
            pair = [TrainCase(kind, is_full, num_streams, is_checkpointed=False) for kind in (PLAIN, STREAMS)]
            measure_times(pair, args)
            table.add_row(*cells(*pair, arithmetic_ratio(args, num_streams)))
    Console().print(table)


if __name__ == "__main__":
    main()
