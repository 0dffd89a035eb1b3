"""lm-eval's tasks: found, loaded with their data, and scored by lm-eval's own `evaluate`, as its `simple_evaluate` does."""

import difflib
import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import fingerprint_of_files
from .bootstrap import Metric, resampled, statistic_of
from .measures import Scores
from .settings import EvaluationSettings


if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_KEYS = ("name", "num_fewshot")
_MAX_REASON = 300
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
_GENERATING = "generate_until"


@dataclass(frozen=True)
class Benchmark:
    """One task of lm-eval, which may be one of a group.

    Args:
        name: lm-eval's.
        task: with its data loaded.
        num_fewshot: examples in the prompt; None for the task's own number.
        settings: of the evaluation.
    """

    name: str
    task: "Task"
    num_fewshot: int | None
    settings: EvaluationSettings
    kind: str = "task"

    @property
    def generates(self) -> bool:
        """Whether models write answers."""
        return self.task.OUTPUT_TYPE == _GENERATING

    @property
    def is_local(self) -> bool:
        """Whether the data lies in files, and is no data set of the hub."""
        return self.task.get_config("dataset_path") in _FILE_FORMATS

    def content(self) -> dict[str, Any]:
        """Configuration, items, examples and code of the task, and lm-eval's version."""
        import lm_eval

        config = {name: value for name, value in self.task.dump_config().items() if name != "num_fewshot"}
        config["metadata"] = {**(config.get("metadata") or {})}
        folder = Path(config["metadata"].pop("config_source", "")).parent
        if self.is_local:
            config.pop("dataset_kwargs", None)  # where the files are; what they hold is among the items
        return {
            "task": _digest(config),
            "items": _digest([*self.task.eval_docs]),
            "examples": _digest([*(self.task.fewshot_docs() or ())]),
            "code": fingerprint_of_files(sorted(folder.glob("*.py"))),
            "num_fewshot": self.task.get_config("num_fewshot") if self.num_fewshot is None else self.num_fewshot,
            "limit": self.settings.limit,
            "apply_chat_template": self.settings.apply_chat_template,
            "lm_eval": lm_eval.__version__,
        }

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> Scores:
        """lm-eval's numbers, with its own seeds; its items are resampled."""
        import lm_eval

        from .scoring_model import BeamLM

        scorer = BeamLM(pretrained=model, tokenizer=tokenizer, batch_size=self.settings.batch_size)
        scorer.num_beams = num_beams
        self._prepare()
        found = lm_eval.evaluate(
            scorer,
            {"tasks": {self.name: self.task}},
            limit=self.settings.limit,
            bootstrap_iters=0,
            apply_chat_template=self.settings.apply_chat_template,
            fewshot_as_multiturn=True,
        )
        metrics = {
            name: self._metric(name, float(value), found["samples"][self.name])
            for name, value in found["results"][self.name].items()
            if "," in name and "_stderr," not in name
        }
        return Scores(metrics, [_item(sample, self.generates) for sample in found["samples"][self.name]])

    def _prepare(self) -> None:
        """What `simple_evaluate` does first. It itself asks the system for all its versions each time, which takes seconds."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        if self.num_fewshot is not None:
            self.task.set_config("num_fewshot", self.num_fewshot)
        elif self.task.get_config("num_fewshot") is None:
            self.task.set_config("num_fewshot", 0)
        self.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    def _metric(self, name: str, value: float, samples: Sequence[Mapping[str, Any]]) -> Metric:
        from lm_eval.api.metrics import mean

        metric, _, filter_name = name.partition(",")
        items = [sample[metric] for sample in samples if sample["filter"] == filter_name and metric in sample]
        aggregate = self.task.aggregation().get(metric, mean)
        statistic = statistic_of(items, aggregate, is_mean=aggregate is mean)
        return resampled(value, self.task.higher_is_better().get(metric), len(items), statistic, f"{self.name} {name}")


def _item(sample: Mapping[str, Any], generates: bool) -> dict[str, Any]:
    item = {"id": sample["doc_id"], "filter": sample["filter"], "target": sample["target"]}
    if generates:
        item["answer"] = sample["resps"][0][0]
    return item | {name: sample[name] for name in sample["metrics"]}


@dataclass(frozen=True)
class BenchmarkGroup:
    """A group of lm-eval's, whose score is made of those of its tasks as the group says."""

    name: str
    group: "Group"
    tasks: tuple[str, ...]

    def combine(self, scores: Mapping[str, Mapping[str, Metric]]) -> dict[str, Metric]:
        """Metrics of the group from those of its tasks, by name of task; the tasks are resampled independently."""
        found = self._aggregate(
            {name: {key: one.value for key, one in scores[name].items()} for name in self.tasks}, scores
        )
        metrics = {}
        for key, value in found.items():
            parts = [scores[name][key] for name in self.tasks if key in scores[name]]
            replicates = []
            if all(part.replicates for part in parts):
                for drawn in range(len(parts[0].replicates)):
                    values = {
                        name: {key: scores[name][key].replicates[drawn]} for name in self.tasks if key in scores[name]
                    }
                    replicates.append(self._aggregate(values, scores)[key])
            num_items = sum(part.num_items for part in parts)
            metrics[key] = Metric(value, parts[0].higher_is_better, num_items, replicates)
        return metrics

    def _aggregate(
        self, values: Mapping[str, Mapping[str, float]], scores: Mapping[str, Mapping[str, Metric]]
    ) -> dict[str, float]:
        sizes = {name: max((one.num_items for one in scores[name].values()), default=0) for name in values}
        found = self.group.aggregate({name: {**some, "sample_len": sizes[name]} for name, some in values.items()})
        return {key: float(value) for key, value in found.items() if "," in key and "_stderr," not in key}


def benchmarks(settings: EvaluationSettings) -> tuple[list[Benchmark], list[BenchmarkGroup]]:
    """The tasks of the settings with their data, and the groups among them.

    Raises:
        ValueError: lm-eval is missing, a task is unknown, its data can't be reached, it runs generated code or reads
            pictures, or a setting can't be followed.
    """
    if not settings.tasks:
        if settings.task_folders:
            raise ValueError("`task_folders` holds tasks, but `tasks` names none: name those to score.")
        return [], []
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("`tasks` needs lm-eval, which is not installed: pip install 'parscale_adapt[evaluation]'.")
    entries = [_entry(value) for value in settings.tasks]
    manager = _task_manager(settings.task_folders, [entry["name"] for entry in entries])
    found: dict[str, Benchmark] = {}
    groups: list[BenchmarkGroup] = []
    for entry in entries:
        loaded = _load(manager, entry["name"])
        for name, task in loaded["tasks"].items():
            if name in found:
                raise ValueError(f"The task {name} comes twice in `tasks`: name it once.")
            _check_task(name, task, entry.get("num_fewshot"), settings)
            found[name] = Benchmark(name, task, entry.get("num_fewshot"), settings)
        for name, group in loaded.get("groups", {}).items():
            if group.has_aggregation and name == entry["name"]:
                groups.append(BenchmarkGroup(name, group, tuple(task.task_name for task in group.get_all_tasks())))
    return [*found.values()], groups


def _entry(value: Any) -> dict[str, Any]:
    entry = dict(value) if isinstance(value, Mapping) else {"name": value}
    unknown = sorted(entry.keys() - {*_KEYS})
    if unknown or not isinstance(entry.get("name"), str):
        problem = f"has the unknown key {unknown[0]!r}" if unknown else "lacks a `name`"
        raise ValueError(
            f"An entry of `tasks` {problem}, got {value!r}: write a name, or {{name: ..., num_fewshot: ...}}."
        )
    number = entry.get("num_fewshot")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        raise ValueError(f"`num_fewshot` of {entry['name']} must be a whole number of at least 0, got {number!r}.")
    return entry


def _task_manager(folders: Sequence[str], names: Sequence[str]) -> "TaskManager":
    """Knows the user's tasks, and lm-eval's own where one of those is asked for: to read these takes seconds.

    Raises:
        ValueError: a folder is missing, or a name is that of no task.
    """
    from lm_eval.tasks import TaskManager

    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise ValueError(
                f"`task_folders` names {path}, where no folder is: give folders with lm-eval's task YAMLs."
            )
    if paths:
        manager = TaskManager(include_path=[*paths], include_defaults=False)
        if all(_is_complete(name, manager.task_index) for name in names):
            return manager
    manager = TaskManager(include_path=[*paths] or None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            advice = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all."
            raise ValueError(f"lm-eval knows no task {name!r}, and `task_folders` holds none of that name: {advice}")
    return manager


def _is_complete(name: str, index: Mapping[str, Any]) -> bool:
    """Whether a task is in the index, with all members where it is a group."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task", ())
    names = [member if isinstance(member, str) else "" for member in members] if isinstance(members, list) else []
    return all(_is_complete(member, index) for member in names)


def _load(manager: "TaskManager", name: str) -> Any:
    """A task with its data. Tasks are code of many hands, so anything may be raised.

    Raises:
        ValueError: it can't be loaded.
    """
    try:
        return manager.load([name])
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_REASON]}".rstrip(". :")
        if isinstance(error, ImportError):
            advice = f"install what it needs, such as pip install 'lm-eval[{name}]'"
        elif _is_offline():
            advice = "this machine is offline (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE), so give a task with local data"
        else:
            advice = "go online, or give a task with local data in `task_folders`"
        raise ValueError(f"The task {name} can't be loaded: {advice} ({reason}).") from error


def _is_offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE)


def _check_task(name: str, task: "Task", num_fewshot: int | None, settings: EvaluationSettings) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"The task {name} runs generated code in this very process, which is never done here: name the problems under "
            "`code`."
        )
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"The task {name} shows pictures or sound, and this scores text alone: leave it out.")
    if num_fewshot is not None and task.get_config("num_fewshot") == 0 != num_fewshot:
        raise ValueError(
            f"The task {name} is defined without examples, got `num_fewshot: {num_fewshot}`: leave it out."
        )
    sampled = task.OUTPUT_TYPE == _GENERATING and (task.get_config("generation_kwargs") or {}).get("do_sample")
    if sampled and settings.beams:
        raise ValueError(f"The task {name} samples its answers, and `beams` searches for them: leave one out.")


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_as_json, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_json(value: Any) -> Any:
    with suppress(AttributeError):  # arrays and their numbers
        return value.tolist()
    return getattr(value, "__qualname__", None) or str(value)
