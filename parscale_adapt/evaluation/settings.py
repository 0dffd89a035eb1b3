"""What is scored, and on what: the YAML file of `parscale evaluate` and the arguments of `recipes/evaluate.py`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml


_TEXT_KEYS = ("name", "path", "text_field", "split", "config")
_MAX_NAME = 100  # it becomes a part of names of files


@dataclass
class EvaluationSettings:
    """Models, tasks and settings of an evaluation. In a YAML file an entry of a list may be a mapping with more keys."""

    backbone: str | None = field(default=None, metadata={"help": "Folder or hub name of a plain causal LM."})
    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=PATH or PATH of ParScale adapters on that backbone: folders or hub names."},
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of lm-eval tasks or groups; in YAML also `{name: mmlu, num_fewshot: 5}`."},
    )
    task_folders: list[str] = field(
        default_factory=list, metadata={"help": "Folders with lm-eval task YAMLs of your own."}
    )
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=PATH of held-out text; in YAML also `{name, path, text_field, split, config}`."},
    )
    forgetting: list[str] = field(
        default_factory=list,
        metadata={"help": "As `texts`: text of other kinds than was trained on, on which the backbone comes before."},
    )
    code: list[str] = field(
        default_factory=list,
        metadata={"help": "humaneval=PATH or mbpp=PATH: EvalPlus's problems (.jsonl or .jsonl.gz)."},
    )
    beams: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of beams with which the backbone alone answers the generating tasks as well."},
    )
    output_dir: str = field(default="runs/scores", metadata={"help": "Folder of the scores; finished ones stay."})
    batch_size: int = field(default=8, metadata={"help": "Rows that run together."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row of `texts` and `forgetting`."})
    max_code_tokens: int = field(default=768, metadata={"help": "Tokens of a program of `code` at most."})
    limit: int | None = field(default=None, metadata={"help": "The first so many items of each task, to try things."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Ask lm-eval's tasks as a chat."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Of programs that are sampled."})
    execute_code: str | None = field(
        default=None,
        metadata={"help": "Python of an environment with EvalPlus, which then runs the generated programs."},
    )
    write_cards: bool = field(default=False, metadata={"help": "Put the scores into the adapters' model cards."})

    def __post_init__(self) -> None:
        _check_types(self)
        for name, smallest in (("batch_size", 1), ("max_length", 2), ("max_code_tokens", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}: leave it out to score all items.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if any(not isinstance(number, int) or number < 2 for number in self.beams) or len({*self.beams}) < len(
            self.beams
        ):
            raise ValueError(
                f"`beams` must name different numbers of at least 2, got {self.beams}: one beam is the backbone itself."
            )
        if self.execute_code is not None and not self.code:
            raise ValueError(
                "`execute_code` runs the programs of `code`, which names none: name problems, or drop it."
            )


def read_settings(path: Path, **changes: Any) -> EvaluationSettings:
    """Settings of a YAML file; `changes` that are given replace its own.

    Raises:
        ValueError: there is no such file, it is no YAML mapping, or a key or value is none of [`EvaluationSettings`].
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give a YAML file that names a backbone, adapters and tasks.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a YAML mapping of names to values, got {type(found).__name__}.")
    known = [one.name for one in fields(EvaluationSettings)]
    named = {str(key).replace("-", "_"): value for key, value in found.items()}
    unknown = sorted(named.keys() - {*known})
    if unknown:
        raise ValueError(f"{path} has the unknown key {unknown[0]!r}: choose among {', '.join(known)}.")
    return EvaluationSettings(**named | {name: value for name, value in changes.items() if value is not None})


def named_entries(values: Sequence[Any], setting: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of a list as mappings with the keys `name`, `path` and those of `keys` that are given.

    `NAME=PATH` stands for both, and `PATH` for the path alone, named as its file without suffix, or as its folder; what
    exists as it stands is a path, though it has a "=" in it.

    Raises:
        ValueError: a key is unknown, a value is no text, the path is missing, or two entries have one name.
    """
    entries: dict[str, dict[str, Any]] = {}
    for value in values:
        entry = _entry(value)
        unknown = sorted(entry.keys() - {"name", "path", *keys})
        if unknown or not entry.get("path"):
            problem = f"has the unknown key {unknown[0]!r}" if unknown else "lacks a `path`"
            raise ValueError(
                f"An entry of `{setting}` {problem}, got {value!r}: write NAME=PATH, or a mapping of "
                f"{', '.join(['name', 'path', *keys])}."
            )
        wrong = next((key for key in _TEXT_KEYS if key in entry and not isinstance(entry[key], str)), None)
        if wrong is not None:
            raise ValueError(f"`{wrong}` of an entry of `{setting}` must be text, got {value!r}: put it in quotes.")
        if "name" not in entry:
            place = Path(entry["path"]).expanduser().resolve()
            is_folder = setting == "adapters" or place.is_dir()  # "p4-0.1" has no suffix then
            entry["name"] = place.name if is_folder else place.stem
        if not entry["name"] or entry["name"] in entries:
            raise ValueError(
                f"Each entry of `{setting}` needs a name of its own, got {entry['name']!r}: give NAME=PATH."
            )
        if len(entry["name"]) > _MAX_NAME:
            raise ValueError(
                f"A name in `{setting}` has more than {_MAX_NAME} characters, got {entry['name']!r}: give a shorter NAME=PATH."
            )
        entries[entry["name"]] = entry
    return [*entries.values()]


def _entry(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    text = str(value)
    name, separator, path = text.partition("=")
    if not separator or os.path.exists(os.path.expanduser(text)):
        return {"path": text}
    return {"name": name, "path": path}


def _check_types(settings: EvaluationSettings) -> None:
    """Raises ValueError where a value is none of its field's type; numbers are not taken for text, nor the other way."""
    for name, kind in get_type_hints(EvaluationSettings).items():  # not `fields`, whose types parsers change
        value = getattr(settings, name)
        if kind in (list[str], list[int]):
            fits, wanted = isinstance(value, list), "a list"
        elif kind is bool:
            fits, wanted = isinstance(value, bool), "true or false"
        elif kind in (int, int | None):
            is_number = isinstance(value, int) and not isinstance(value, bool)
            fits, wanted = is_number or (value is None and kind == (int | None)), "a whole number"
        else:
            fits, wanted = isinstance(value, str) or (value is None and kind == (str | None)), "text"
        if not fits:
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
