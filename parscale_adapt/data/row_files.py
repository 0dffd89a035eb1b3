"""Rows of local text files (JSON, CSV, plain text), exactly as they were written, each with the place it stands in.

No type is guessed: a text that looks like a date or a number stays that text, and a cell that says NA is not empty.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow

from ..files import is_lfs_pointer
from .local_files import kind_of


UTF8 = "utf-8"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DELIMITERS = (",", ";", "\t", "|")
_MAX_CELL = 2**31 - 1
_PARQUET_MARK = b"PAR1"  # the last bytes of such a file


class RowError(ValueError):
    """A row or a file that can't be used; the message names the place."""


def iterate_rows(files: list[str], encoding: str = UTF8) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of text files with its place, such as ``a.jsonl, line 3``; lines and rows count from 1.

    A plain text file is one row with the field `text`.

    Raises:
        RowError: a file or a row can't be read.
    """
    for file in files:
        kind = kind_of(file)
        read, newline = _READERS[kind]
        with _opened(file, encoding, newline) as text:
            yield from read(file, text)


def iterate_texts(files: list[str], encoding: str, text_field: str, version: str) -> Iterator[dict[str, str]]:
    """Yield one field of each row as the column `text`; `version` only tells caches what was read.

    Raises:
        RowError: as [`iterate_rows`], or a row lacks the field or holds no text in it.
    """
    for place, row in iterate_rows(files, encoding):
        if text_field not in row:
            raise RowError(
                f"{place} has no field {text_field!r}: its fields are {', '.join(row)}. Name one of these with `text_field`."
            )
        text = row[text_field]
        if not isinstance(text, str):
            found = "null" if text is None else type(text).__name__
            raise RowError(f"{place}: the field {text_field!r} must hold text, got {found}.")
        yield {"text": text}


def iterate_json(files: list[str], encoding: str, version: str) -> Iterator[dict[str, str]]:
    """Yield each row as JSON in the column `row`, with its `place`; Arrow would give all rows the same fields."""
    for place, row in iterate_rows(files, encoding):
        yield {"row": json.dumps(row, ensure_ascii=False), "place": place}


def check_data_file(file: str) -> None:
    """Refuse a file that stands for another one, or that lacks its end.

    Raises:
        RowError: it is a pointer of git-lfs, or a Parquet file that was cut.
    """
    if is_lfs_pointer(file):
        raise RowError(f"{file} is a pointer of git-lfs and not the data: run `git lfs pull` in its clone.")
    if file.endswith(".parquet"):
        with open(file, "rb") as stream:
            stream.seek(max(0, Path(file).stat().st_size - len(_PARQUET_MARK)))
            if stream.read() != _PARQUET_MARK:
                raise RowError(f"{file} is cut off or no Parquet file: copy or download it again.")


@contextmanager
def _opened(file: str, encoding: str, newline: str | None) -> Iterator[io.TextIOWrapper]:
    check_data_file(file)
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise RowError(
            f"`encoding` must be one that Python knows, such as latin-1 or utf-16, got {encoding!r}."
        ) from error
    try:
        stream = io.BufferedReader(pyarrow.input_stream(file))
        with io.TextIOWrapper(stream, "utf-8-sig" if name == UTF8 else name, newline=newline) as text:
            if name == UTF8:
                _check_utf8(file, stream.peek(1024)[:1024])
            yield text
    except UnicodeError as error:
        raise RowError(_describe_undecoded(file, name, error)) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise RowError(f"{file} can't be read: {error}. Copy or download it again.") from error


def _check_utf8(file: str, start: bytes) -> None:
    if start.startswith(_UTF16_MARKS) or b"\0" in start:
        raise RowError(
            f"{file} is no UTF-8 text: it begins like UTF-16, or it is no text at all. Give `encoding` utf-16 "
            "(--dataset_encoding), or save it as UTF-8."
        )


def _describe_undecoded(file: str, encoding: str, error: UnicodeError) -> str:
    place = file
    if encoding == UTF8:
        with io.BufferedReader(pyarrow.input_stream(file)) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode()
                except UnicodeError as undecoded:
                    place, error = f"{file}, line {number}", undecoded
                    break
    return (
        f"{place} is not in the encoding {encoding} ({error}): name the right one with `encoding` (--dataset_encoding), "
        "such as latin-1 or cp1252, or save the file as UTF-8."
    )


def _json_rows(file: str, text: io.TextIOWrapper) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    start = first[1]
    if start.lstrip().startswith("["):
        yield from _listed_rows(file, start + text.read())
        return
    if not _is_json(start) and _is_json(whole := start + text.read()):
        raise RowError(
            f"{file} is one JSON object ({', '.join(json.loads(whole))}) and no list of rows: save the list in it as a file of "
            "its own, or one JSON object per line."
        )
    for number, line in chain([first], lines):
        place = f"{file}, line {number}"
        yield _checked_row(place, _parsed(line, place, "write one JSON object per line, or a list of them"))


def _listed_rows(file: str, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parsed(content, file, "write a list of JSON objects, or one JSON object per line")
    for number, row in enumerate(rows, start=1):
        yield _checked_row(f"{file}, row {number}", row)


def _parsed(text: str, place: str, remedy: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise RowError(f"{place}{line} is no JSON ({error.msg}, character {error.colno}): {remedy}.") from error
    except UnicodeError as error:
        raise RowError(f"{place} holds half of a surrogate pair, which is no character: repair the text.") from error
    return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _checked_row(place: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise RowError(f"{place} holds {type(row).__name__} and not an object with fields: write one object per row.")
    return place, row


def _csv_rows(file: str, text: io.TextIOWrapper) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_MAX_CELL)
    header = text.readline()
    delimiter = next((mark for mark in _DELIMITERS if mark in header), ",")
    reader = csv.reader(chain([header], text), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            place = f"{file}, line {reader.line_num}"
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise RowError(f"{place} names a column twice: {', '.join(names)}.")
            elif cells:
                if len(cells) != len(names):
                    raise RowError(
                        f"{place} has {len(cells)} cells, and the header {len(names)}: quote cells with {delimiter!r}."
                    )
                yield place, dict(zip(names, cells))
    except csv.Error as error:
        raise RowError(
            f"{file}, line {reader.line_num} is no CSV ({error}): quote cells with line breaks or quotes."
        ) from error


def _text_rows(file: str, text: io.TextIOWrapper) -> Iterator[tuple[str, dict[str, Any]]]:
    yield file, {"text": text.read()}


# With what ends a line: JSON may hold any line break but this one, the module csv finds its own.
_READERS: dict[str, tuple[Callable[[str, io.TextIOWrapper], Iterator[tuple[str, dict[str, Any]]]], str | None]] = {
    "json": (_json_rows, "\n"),
    "csv": (_csv_rows, ""),
    "text": (_text_rows, None),
}
