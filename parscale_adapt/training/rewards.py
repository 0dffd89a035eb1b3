"""What answers are worth: reward functions by name, checked before a run and at every call, and two that ship.

A reward function is one of TRL's: it is called with `prompts`, `completions`, `completion_ids`, every other column of the
data and a few more keywords, and returns a number for each completion, or None where it has nothing to say.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import TrainerState

from .failures import describe


RewardFunction = Callable[..., list[float | None]]
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_FINAL = "####"  # what GSM8K writes in front of a final answer
_LARGEST = torch.finfo(torch.float32).max  # trainers keep rewards in this type


class RewardError(ValueError):
    """A reward function returned what can't be rewards."""


def exact_number(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 for each completion that begins with the number in the column `answer`, 0 for others.

    Args:
        completions: texts, or conversations whose last message is the completion.
        answer: the right numbers.
    """
    found = (re.match(r"\s*(-?\d+)", text_of(completion)) for completion in completions)
    return [float(match is not None and match.group(1) == _as_text(right)) for match, right in zip(found, answer)]


def gsm8k_answer(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for each completion with the same final number as the column `answer` of GSM8K, 0 for others.

    Final is the number behind the last "####", which the data has; without one, the last number of a completion. Numbers
    are compared as numbers: "$1,000" is "1000.0".

    Args:
        completions: texts, or conversations whose last message is the completion.
        answer: worked solutions that end with "#### " and the number.
    """
    texts = map(text_of, completions)
    return [float(_is_same(final_number(text), final_number(_as_text(right)))) for text, right in zip(texts, answer)]


def final_number(text: str) -> Decimal | None:
    """The number that a text ends up with, as in [`gsm8k_answer`]; None without one."""
    has_mark = _FINAL in text
    numbers = _NUMBER.findall(text.rpartition(_FINAL)[2])
    if not numbers:
        return None
    try:
        return Decimal(re.sub(r"[$,]", "", numbers[0 if has_mark else -1]))
    except InvalidOperation:
        return None


def text_of(completion: Any) -> str:
    """What a model answered: the completion itself, or what its last message says."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def _as_text(right: Any) -> str:
    """A right answer as text: whole numbers of a column that has others too come as 5.0."""
    return str(int(right) if isinstance(right, float) and right.is_integer() else right)


def _is_same(one: Decimal | None, other: Decimal | None) -> bool:
    return one is not None and one == other


def load_reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """Reward functions by their names, each checked at every call.

    Args:
        names: `package.module.function`, or `path/to/file.py:function`.

    Raises:
        ValueError: there is none, one can't be imported or isn't a plain function, or two have the same name.
    """
    if not names:
        raise ValueError(
            "`reward_functions` is empty: name what rewards answers, such as `--reward_functions file.py:function`."
        )
    modules: dict[Path, ModuleType] = {}
    functions = [checked(_load(name, modules), name) for name in names]
    known: dict[str, str] = {}
    for name, function in zip(names, functions):
        other = known.setdefault(function.__name__, name)
        if other != name or names.count(name) > 1:
            raise ValueError(
                f"`reward_functions` names two functions {function.__name__!r}, which the log could not tell apart: rename one."
            )
    return functions


def _load(name: str, modules: dict[Path, ModuleType]) -> RewardFunction:
    """The function of a name; a file that is none of `modules` is run and joins them."""
    file, colon, attribute = name.rpartition(":")
    if not colon:
        file, _, attribute = name.rpartition(".")
    try:
        module = _module_of_file(Path(file).expanduser(), modules) if colon else importlib.import_module(file)
        function = getattr(module, attribute)
    except Exception as error:  # whatever the user's file raises
        raise ValueError(
            f"`reward_functions` names {name}, which can't be imported ({describe(error)}): give `package.module.function` "
            "or `path/to/file.py:function`."
        ) from error
    if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"`reward_functions` names {name}, which must be a plain function, got {function!r}.")
    return function


def file_of(name: str) -> Path | None:
    """The file in which a reward function is, where its name tells it."""
    file, colon, _ = name.rpartition(":")
    return Path(file).expanduser() if colon else None


def _module_of_file(path: Path, modules: dict[Path, ModuleType]) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    place = path.resolve()
    if place not in modules:
        name = f"reward_functions_{hashlib.blake2b(bytes(place), digest_size=8).hexdigest()}"
        spec = importlib.util.spec_from_file_location(name, place)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses and pickle look a class up
        spec.loader.exec_module(module)
        modules[place] = module
    return modules[place]


def checked(function: RewardFunction, name: str) -> RewardFunction:
    """The same function, which refuses what it can't have meant.

    Raises:
        RewardError: at a call, it didn't return one finite number, or None, for each completion.
    """

    @functools.wraps(function)
    def rewards(*args: Any, **kwargs: Any) -> list[float | None]:
        values = function(*args, **kwargs)
        if hasattr(values, "tolist"):  # arrays and tensors
            values = values.tolist()
        if not isinstance(values, list | tuple):
            raise RewardError(
                f"the reward function {name} must return a list of numbers, got {type(values).__name__}."
            )
        num_wanted = len(kwargs["completions"])
        if len(values) != num_wanted:
            raise RewardError(
                f"the reward function {name} returned {len(values)} rewards for {num_wanted} completions: it must return one "
                "for each."
            )
        return [_reward(value, name) for value in values]

    return rewards


def _reward(value: Any, name: str) -> float | None:
    plain = value.tolist() if hasattr(value, "tolist") else value  # one number of numpy or torch
    if plain is None:
        return None
    try:
        number = float(plain) if isinstance(plain, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST:
        raise RewardError(
            f"the reward function {name} returned {value!r}: rewards must be finite numbers that float32 holds, or None "
            "where it has nothing to say."
        )
    return number


def try_reward_functions(functions: Sequence[RewardFunction], rows: Sequence[Mapping[str, Any]]) -> None:
    """Call each function once on questions of the data and empty answers, as a trainer would, before weights load.

    Raises:
        ValueError: one fails.
        RewardError: as [`checked`].
    """
    prompts = [row["prompt"] for row in rows]
    empty = "" if isinstance(prompts[0], str) else [{"role": "assistant", "content": ""}]
    columns = {
        key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion", "completion_ids")
    }
    for function in functions:
        try:
            function(
                prompts=prompts,
                completions=[empty for _ in rows],
                completion_ids=[[] for _ in rows],
                trainer_state=TrainerState(),
                log_extra=lambda column, values: None,
                log_metric=lambda name, value: None,
                **columns,
            )
        except RewardError:
            raise
        except Exception as error:  # whatever the user's function raises
            raise ValueError(
                f"the reward function {function.__name__} fails on the first questions and empty answers "
                f"({describe(error)}); it is called with `prompts`, `completions`, `completion_ids` and the columns "
                f"{', '.join(columns) or '(none)'}, and must take further keywords (`**kwargs`)."
            ) from error
