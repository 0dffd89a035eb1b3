"""Where the time of a training step goes, by torch's profiler: operations of the plain backbone and of streams."""

import argparse
import gc

import torch
from torch.profiler import ProfilerActivity, profile
from train_cases import CHUNKS, PLAIN, STREAMS, TrainCase, TrainModel, num_warmups


# By the first of these words that the name of an operation has.
GROUPS = {
    "attention": ("scaled_dot_product", "flash_attention", "fmha", "flash_fwd", "flash_bwd"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "gemm", "cutlass", "nvjet"),
    "copies and layout": ("copy_", "aten::cat", "CatArray", "clone", "constant_pad", "contiguous", "fill_", "zero_"),
}
REST = "everything else"
KINDS = (PLAIN, STREAMS, CHUNKS)


def profile_steps(args: argparse.Namespace) -> list[dict]:
    """Milliseconds of one step by group of operations, for the largest P, not checkpointed.

    Returns:
        For each kind of training and step: `training`, `num_streams`, `kind`, `milliseconds` by group, and `operations`,
        how many there were.
    """
    rows, num_streams = [], max(args.train_streams)
    for is_full in (False, True):
        model = TrainModel(args, num_streams, is_full)
        for kind in KINDS:
            case = TrainCase(kind, is_full, num_streams, is_checkpointed=False)
            model.prepare(case)
            for _ in range(num_warmups(kind)):
                model.step(case)
            rows.append(
                {
                    "training": "full" if is_full else "frozen",
                    "num_streams": num_streams,
                    "kind": kind,
                    **_profiled(model, case, args.device == "cuda"),
                }
            )
        del model
        gc.collect()
    return rows


def _profiled(model: TrainModel, case: TrainCase, is_on_gpu: bool) -> dict:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_on_gpu else [])]
    with profile(activities=activities) as recorded:
        model.step(case)
        if is_on_gpu:
            torch.cuda.synchronize()
    milliseconds, operations = dict.fromkeys((*GROUPS, REST), 0.0), 0
    for event in recorded.key_averages():
        own = event.self_device_time_total if is_on_gpu else event.self_cpu_time_total
        milliseconds[group_of(event.key)] += own / 1e3
        operations += event.count if event.key.startswith("aten::") else 0
    return {"milliseconds": milliseconds, "operations": operations}


def group_of(operation: str) -> str:
    """The group of an operation or a kernel, by its name."""
    return next((group for group, words in GROUPS.items() if any(word in operation for word in words)), REST)
