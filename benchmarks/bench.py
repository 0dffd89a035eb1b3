"""All of docs/benchmarks.md in one run: the machine's limits, training steps, prompts and tokens.

    python benchmarks/bench.py --json bench.json --page docs/benchmarks.md

What is compared takes turns in one process; medians with their spread are shown, beside the fraction of what the
machine's own rates of matrix products and copies allow. `--from_json` writes the page of an earlier run.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

import decode_cases
import step_profile
import torch
import train_cases
from bench_page import show, write_page
from limits import Limits, measure_limits
from timing import describe_machine


def run(args: argparse.Namespace) -> dict:
    start = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    itemsize, config = torch.empty(0, dtype=dtype).element_size(), train_cases.build_config(args)
    training = train_cases.train_cases(args)
    train_cases.measure_peaks(training, args)  # first, since it forks
    before = measure_limits(args.device, dtype)
    train_cases.measure_times(training, args)
    profiled = step_profile.profile_steps(args)
    decoding = decode_cases.decode_cases(args, config, itemsize)
    decode_cases.measure_decoding(decoding, args, before)
    after = measure_limits(args.device, dtype)
    limits = Limits(*(max(pair) for pair in zip(before, after)))
    return {
        "machine": describe_machine(args),
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "command": shlex.join(["python", *sys.argv]),
        "arguments": vars(args),
        "minutes": (time.perf_counter() - start) / 60,
        "limits": {"before": before._asdict(), "after": after._asdict()},
        "training": train_cases.as_rows(training, args, limits),
        "profile": profiled,
        "decoding": decode_cases.as_rows(decoding, config, itemsize, limits),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--intermediate_size", type=int, help="8/3 of the hidden size by default")
    parser.add_argument("--num_heads", type=int, help="heads of size 64 by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train_streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch_size", type=int, default=1, help="samples of a training step")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a sample of a training step")
    parser.add_argument("--train_repeats", type=int, default=3)
    parser.add_argument("--decode_streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 2048, 8192])
    parser.add_argument("--output_len", type=int, default=12, help="timed tokens")
    parser.add_argument("--max_cache_gib", type=float, default=1.0, help="larger caches are left out")
    parser.add_argument(
        "--max_prefill_seconds", type=float, default=4.0, help="prompts of which the limit is longer are"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--from_json", help="measure nothing and take the figures of this file")
    parser.add_argument("--page", help="write table and pictures into this page, between its two marks")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    train_cases.ignore_warnings()
    figures = json.loads(Path(args.from_json).read_text()) if args.from_json else run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    show(figures)
    if args.page:
        write_page(figures, Path(args.page))


if __name__ == "__main__":
    main()
