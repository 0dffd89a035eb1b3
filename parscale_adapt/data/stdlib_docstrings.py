"""Questions and answers made from the standard library's own docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import random
import warnings
from collections.abc import Iterator
from itertools import chain

from datasets import Dataset, DatasetDict

from .stdlib_corpus import load_stdlib_corpus


MAX_PROMPT_LENGTH = 300
ANSWER_LENGTHS = range(20, 801)

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def stdlib_docstring_pairs() -> DatasetDict:
    """Make one question and answer per documented module, class and function of the standard library.

    The answer is the docstring's first paragraph, on one line. Left out: private names, answers outside 20 to 800
    characters, questions above 300 characters.

    Returns:
        Splits `train` and `heldout` (by file, as in `load_stdlib_corpus`) with the columns `prompt` and
        `completion` (strings), in the order of the files.
    """
    pairs = {}
    for split, corpus in load_stdlib_corpus().items():
        rows = [pair for row in corpus for pair in pairs_of_module(row["path"], row["text"])]
        columns = {"prompt": [prompt for prompt, _ in rows], "completion": [answer for _, answer in rows]}
        pairs[split] = Dataset.from_dict(columns)
    return DatasetDict(pairs)


@functools.cache
def stdlib_preference_pairs() -> DatasetDict:
    """Make a pair of a right and a wrong answer of each question of [`stdlib_docstring_pairs`].

    The wrong answer has the words of the right one in another order, so that it is as long.

    Returns:
        Splits `train` and `heldout` with the columns `prompt`, `chosen` and `rejected` (strings).
    """
    splits = {}
    for split, pairs in stdlib_docstring_pairs().items():
        rows = [{**row, "rejected": _disordered(row["completion"])} for row in pairs]
        rows = [row for row in rows if row["rejected"] != row["completion"]]
        splits[split] = Dataset.from_list(rows).rename_column("completion", "chosen")
    return DatasetDict(splits)


def _disordered(answer: str) -> str:
    words = answer.split()
    random.Random(answer).shuffle(words)
    return " ".join(words)


def pairs_of_module(path: str, text: str) -> list[tuple[str, str]]:
    """Return the questions and answers of one source file; `path` is relative to the library's root."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if _any_private(parts):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(text)
    name = ".".join(parts)
    module = [(f"What is the module `{name}` for?", _first_paragraph(tree))]
    found = chain(module, _pairs_below(tree, name))
    return [pair for pair in dict.fromkeys(found) if _is_sane(*pair)]


def _pairs_below(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        qualified = f"{name}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield f"What is the class `{qualified}`?", _first_paragraph(node)
            yield from _pairs_below(node, qualified)
        else:
            yield f"What does `{qualified}({_arguments(node, parent)})` do?", _first_paragraph(node)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, parent: ast.Module | ast.ClassDef) -> str:
    arguments = node.args
    if isinstance(parent, ast.ClassDef) and arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    return ast.unparse(arguments)


def _first_paragraph(node: _Documented) -> str:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return ""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def _is_sane(prompt: str, answer: str) -> bool:
    has_words = sum(character.isalpha() or character.isspace() for character in answer) > 0.7 * len(answer)
    return len(prompt) <= MAX_PROMPT_LENGTH and len(answer) in ANSWER_LENGTHS and has_words


def _any_private(parts: list[str]) -> bool:
    return any(part.startswith("_") for part in parts)
