"""Training steps of one shape: the plain backbone, LoRA, and P streams, in chunks or not, checkpointed or not."""

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from backbone import build_backbone, random_ids
from limits import ForwardPass, Limits, forward_work, plain_rows_work, seconds_at_limit
from peft import LoraConfig, get_peft_model
from timing import seconds
from torch.nn import functional as F
from transformers import PreTrainedConfig

from parscale_adapt import ParScaleConfig


PLAIN, LORA, STREAMS, CHUNKS = "plain backbone", "LoRA", "streams", "streams in chunks"
KINDS = (PLAIN, STREAMS, CHUNKS)
_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass
class TrainCase:
    """One kind of step; the plain backbone runs P * B rows, whose mean over P goes to the LM head, as do B rows of the
    others."""

    kind: str
    is_full: bool
    num_streams: int
    is_checkpointed: bool
    times: list[float] = field(default_factory=list)
    peak_mib: float | None = None


class TrainModel:
    """One model that runs all kinds of steps in turn, so that a large backbone is held once.

    Args:
        args: of the command line.
        num_streams: `P`; 1 has LoRA and no streams.
        is_full: whether the backbone is trained.
    """

    def __init__(self, args: argparse.Namespace, num_streams: int, is_full: bool):
        self.args, self.num_streams = args, num_streams
        if num_streams == 1:
            config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        else:
            config = ParScaleConfig(num_streams=num_streams, train_backbone=is_full)
        self.model = get_peft_model(build_backbone(args), config).train()
        self.model.enable_input_require_grads()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        torch.manual_seed(0)
        self.input_ids = random_ids(args, args.batch_size)

    def prepare(self, case: TrainCase) -> None:
        """Let the next steps be those of a case."""
        base = self.model.get_base_model()
        if case.is_checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        if self.num_streams > 1:
            self.model.set_stream_chunk_size(1 if case.kind == CHUNKS else None)

    def step(self, case: TrainCase) -> None:
        base, is_plain = self.model.get_base_model(), case.kind == PLAIN
        input_ids = self.input_ids.repeat(self.num_streams, 1) if is_plain else self.input_ids
        with self.model.disable_adapter() if is_plain else nullcontext():
            states = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
            if is_plain:
                states = states.unflatten(0, (self.num_streams, -1)).mean(0)
            logits = base.get_output_embeddings()(states).float()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), self.input_ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def ignore_warnings() -> None:
    """The plain backbone is measured in the model that trains, and checkpointing is switched by the name that all versions
    have."""
    for message in ("Adapter .* is switched off while it trains", ".*gradient_checkpointing.* is deprecated"):
        warnings.filterwarnings("ignore", message)


def train_cases(args: argparse.Namespace) -> list[TrainCase]:
    """In the order in which they run: those of one model together."""
    cases = [TrainCase(LORA, False, 1, is_checkpointed) for is_checkpointed in (False, True)]
    for is_full in (False, True):
        for num_streams in args.train_streams:
            for is_checkpointed in (False, True):
                cases += [TrainCase(kind, is_full, num_streams, is_checkpointed) for kind in KINDS]
    return cases


def num_warmups(kind: str) -> int:
    """Steps before the first that is measured: one makes the optimizer's states, and chunks look at the step before."""
    return 2 if kind == CHUNKS else 1


def groups_of(cases: list[TrainCase]) -> list[list[TrainCase]]:
    keys = dict.fromkeys((case.is_full, case.num_streams) for case in cases)
    return [[case for case in cases if (case.is_full, case.num_streams) == key] for key in keys]


def measure_times(cases: list[TrainCase], args: argparse.Namespace) -> None:
    """Steps of one model take turns, from the first to the last and back, so that none always comes later."""
    for group in groups_of(cases):
        model = TrainModel(args, group[0].num_streams, group[0].is_full)
        for repeat in range(-2, args.train_repeats):
            for case in group if repeat % 2 else reversed(group):
                if repeat < -num_warmups(case.kind):
                    continue
                model.prepare(case)
                time = seconds(lambda model=model, case=case: model.step(case), args.device)
                if repeat >= 0:
                    case.times.append(time)
        del model
        gc.collect()


def measure_peaks(cases: list[TrainCase], args: argparse.Namespace) -> None:
    """Above weights and optimizer states: on a GPU by its allocator, else the peak resident size of a fresh process.

    To be called before anything has started threads, since processes are forked.
    """
    for case in cases:
        if args.device == "cuda":
            case.peak_mib = _peak_on_gpu(case, args)
            continue
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_send_peak, args=(case, args, sender))
        process.start()
        sender.close()
        case.peak_mib = receiver.recv()
        process.join()


def _warmed_up(case: TrainCase, args: argparse.Namespace) -> TrainModel:
    model = TrainModel(args, case.num_streams, case.is_full)
    model.prepare(case)
    for _ in range(num_warmups(case.kind)):
        model.step(case)
    gc.collect()
    return model


def _peak_on_gpu(case: TrainCase, args: argparse.Namespace) -> float:
    model = _warmed_up(case, args)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.step(case)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _send_peak(case: TrainCase, args: argparse.Namespace, sender) -> None:
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)  # so that what is freed goes back to the system at once
    model = _warmed_up(case, args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_mib("VmRSS")
    model.step(case)
    sender.send(_status_mib("VmHWM") - before)


def _status_mib(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def as_rows(cases: list[TrainCase], args: argparse.Namespace, limits: Limits) -> list[dict]:
    """Figures of all cases; ratios are to the plain backbone under the same checkpointing, and for LoRA there is none."""
    config = build_config(args)
    itemsize = torch.empty(0, dtype=getattr(torch, args.dtype)).element_size()
    plain = {(case.is_full, case.num_streams, case.is_checkpointed): case for case in cases if case.kind == PLAIN}
    rows = []
    for case in cases:
        base = plain.get((case.is_full, case.num_streams, case.is_checkpointed))
        median = statistics.median(case.times)
        work_of = plain_rows_work if case.kind == PLAIN else forward_work
        work = work_of(config, itemsize, ForwardPass(case.num_streams, args.batch_size, args.seq_len))
        at_limit = (3 if case.is_full else 2) * seconds_at_limit(work, limits)
        rows.append(
            {
                "training": "full" if case.is_full else "frozen",
                "num_streams": case.num_streams,
                "kind": case.kind,
                "checkpointed": case.is_checkpointed,
                "seconds": median,
                "spread": [min(case.times), max(case.times)],
                "time_ratio": None if base is None else median / statistics.median(base.times),
                "peak_mib": case.peak_mib,
                "peak_ratio": case.peak_mib / base.peak_mib
                if base is not None and base.peak_mib
                else None,  # tiny shapes
                "fraction_of_limit": at_limit / median,
            }
        )
    return rows


def build_config(args: argparse.Namespace) -> PreTrainedConfig:
    """Of the backbone, whose weights are not made."""
    return build_backbone(argparse.Namespace(**{**vars(args), "device": "meta"})).config
