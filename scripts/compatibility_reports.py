"""Examining one architecture: building it, wrapping it, running every check, in a process of its own."""

import multiprocessing
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from compatibility_case import Case, NotApplicable, describe_error
from compatibility_checks import checks_of
from tiny_architectures import CLASS_NAMES, NOT_ALONE, task_of, tiny_model
from transformers import PreTrainedConfig

import parscale_adapt


_PACKAGE = Path(parscale_adapt.__file__).parent
WORKS, NOT_APPLICABLE, FAILS = "works", "not applicable", "fails"
IMPLEMENTATIONS = ("sdpa", "eager")
TIMEOUT_SECONDS = 300
WRAPPING, RUNNING = "wrapping", "running"


@dataclass
class Outcome:
    """How one check ended under one attention implementation, and the remark, reason or error that belongs to it."""

    check: str
    implementation: str
    status: str
    remark: str = ""


@dataclass
class Report:
    """What was found for one model type, or for one of `tiny_architectures.OTHER_TASKS`.

    `impossible` says why no tiny model could be built, `refused` is the package's own sentence where it refuses the
    model. `layers` are the kinds of layers, `prefixes` sizes of the prefixes and how many attention modules have them.
    """

    model_type: str
    class_name: str
    impossible: str = ""
    refused: str = ""
    implementations: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    prefixes: dict[str, int] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        """What fails."""
        return [outcome for outcome in self.outcomes if outcome.status == FAILS]

    @property
    def works(self) -> bool:
        """Whether every applicable check holds."""
        return bool(self.outcomes) and not self.failures


def examine(
    model_type: str,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    checks: dict[str, Callable[[Case], str]] | None = None,
) -> Report:
    """Run `checks`, by default all of its task, on a tiny model, under each of `implementations` that it has."""
    report = Report(model_type, CLASS_NAMES[model_type])
    checks = checks_of(task_of(model_type)) if checks is None else checks
    try:
        model = tiny_model(model_type)
    except Exception as error:
        report.impossible = NOT_ALONE.get(model_type) or describe_error(error).partition(". ")[0]
        return report
    report.layers = _kinds_of_layers(model.config)
    available = [name for name in implementations if _is_available(model_type, name)]
    refusals = {}
    for implementation in available or [model.config._attn_implementation]:
        try:
            case = Case(model_type, implementation)
        except Exception as error:
            if isinstance(error, ValueError) and _raised_in_package(error):
                refusals[implementation] = str(error)
            else:
                report.outcomes.append(Outcome(WRAPPING, implementation, FAILS, describe_error(error)))
            continue
        report.implementations.append(implementation)
        report.prefixes = _sizes_of_prefixes(case)
        report.outcomes += [run_check(name, check, case) for name, check in checks.items()]
    if report.outcomes:
        report.outcomes += [Outcome(WRAPPING, name, NOT_APPLICABLE, text) for name, text in refusals.items()]
    else:
        report.refused = next(iter(refusals.values()))
    return report


def run_check(name: str, check: Callable[[Case], str], case: Case) -> Outcome:
    """The outcome of one check; whatever it raises is an outcome too."""
    try:
        return Outcome(name, case.implementation, WORKS, check(case))
    except NotApplicable as reason:
        return Outcome(name, case.implementation, NOT_APPLICABLE, str(reason))
    except Exception as error:
        return Outcome(name, case.implementation, FAILS, describe_error(error))


def _raised_in_package(error: Exception) -> bool:
    return _PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


def _is_available(model_type: str, implementation: str) -> bool:
    try:
        tiny_model(model_type, implementation)
    except ValueError:
        return False
    return True


def _kinds_of_layers(config: PreTrainedConfig) -> list[str]:
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    return [kind.removesuffix("_attention") for kind in dict.fromkeys(kinds)]


def _sizes_of_prefixes(case: Case) -> dict[str, int]:
    shapes = {name: tensor.shape for name, tensor in case.model.state_dict().items()}
    sizes: Counter[str] = Counter()
    for name, (_, num_heads, _, key_size) in ((n, s) for n, s in shapes.items() if "parscale_prefix_k" in n):
        value_size = shapes[name.replace("parscale_prefix_k", "parscale_prefix_v")][-1]
        sizes[f"{num_heads} x {key_size}" + (f"/{value_size}" if value_size != key_size else "")] += 1
    return dict(sizes)


@lru_cache
def _context() -> multiprocessing.context.ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Older Pythons don't tell the fork server where to import from.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


def examine_apart(
    model_type: str,
    implementations: Sequence[str],
    timeout_seconds: float = TIMEOUT_SECONDS,
    examiner: Callable[..., Report] = examine,
) -> Report:
    """[`examine`] in a process of its own; a crash and a process that takes too long are failures of that type."""
    context = _context()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_report, args=(sending, examiner, model_type, implementations))
    process.start()
    sending.close()
    try:
        if receiving.poll(timeout_seconds):
            return receiving.recv()
        problem = f"it took more than {timeout_seconds:g} seconds"
    except EOFError:
        process.join()
        problem = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiving.close()
    return Report(model_type, CLASS_NAMES[model_type], outcomes=[Outcome(RUNNING, "", FAILS, problem)])


def _send_report(sending: Connection, examiner: Callable, model_type: str, implementations: Sequence[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sending.send(examiner(model_type, implementations))
