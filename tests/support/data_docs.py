"""Runs the lines of the tables in docs/data.md: writes the files that a line names, reads them, says what came of it.

A line has three cells: names of files and options (`--name value`), the content of each file, and the outcome. `\\n` is
a line break, `NAME` the name of the file without its ending, `(nothing)` no content. Files called latin-1, utf-8-sig
or utf-16 are in that encoding, `.parquet` and folders with a slash at their end (`save_to_disk`) hold the JSON rows as Arrow tables,
`.gz` is compressed.
"""

import gzip
import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from datasets import Dataset, DatasetDict

from parscale_adapt.data import (
    CHATML,
    DataSource,
    InstructionSettings,
    TextSource,
    default_heldout_split,
    load_rows,
    load_source,
    prepare_instructions,
)
from parscale_adapt.data.packing import IGNORED_LABEL
from support.tiny_tokenizers import byte_tokenizer


ENCODINGS = ("latin-1", "utf-8-sig", "utf-16")
EMPTY = "(nothing)"
SETTINGS = ("max_length", "train_on", "prompt_field", "completion_field")


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Args:
        files: their names; the last may be a pattern.
        options: as on the command line of a recipe.
        content: of each file, but for
        own_contents: those with a content of their own (`name: content`).
        outcome: what the document says.
    """

    files: list[str]
    options: dict[str, str]
    content: str
    outcome: str
    own_contents: dict[str, str] = field(default_factory=dict)


def lines_of(document: Path, heading: str) -> list[Line]:
    """The lines of the tables below a heading."""
    section = re.split(r"^#+ ", document.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.partition("\n")[0] == heading]
    rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in text.splitlines() if row.startswith("|")]
    return [_line([cell.strip().replace("\\|", "|") for cell in row]) for row in rows if row[0].strip()[:1] == "`"]


def _line(cells: list[str]) -> Line:
    spans = re.findall(r"`([^`]+)`", cells[0])
    options = dict(span[2:].split(" ", 1) for span in spans if span.startswith("--"))
    names = [span for span in spans if not span.startswith("--")]
    own_contents = dict(name.split(": ", 1) for name in names if ": " in name)
    files = [name for name in names if ": " not in name]
    return Line(files, options, _text(cells[1].strip("`")), cells[2], own_contents)


def _text(written: str) -> str:
    return written.replace("\\n", "\n").replace("\\t", "\t")


def write_files(line: Line) -> None:
    """Write the files of a line to the working directory; none where it gives no content."""
    saved: dict[str, dict[str, Dataset]] = {}
    for name in line.files:
        if not line.content or "*" in name:
            continue
        path = Path(name)
        content = "" if line.content == EMPTY else line.content.replace("NAME", path.name.split(".")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            _write(path, content)
            continue
        dataset = _table(content)
        if len(path.parts) == 1:
            dataset.save_to_disk(path)
        else:
            saved.setdefault(path.parts[0], {})[path.name] = dataset
    for name, splits in saved.items():
        DatasetDict(splits).save_to_disk(name)
    for name, content in line.own_contents.items():
        Path(name).write_text(_text(content))


def _write(path: Path, content: str) -> None:
    if path.suffix == ".parquet" and content.startswith("{"):
        _table(content).to_parquet(path)
        return
    encoded = content.encode(path.stem if path.stem in ENCODINGS else "utf-8")
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)


def _table(content: str) -> Dataset:
    return Dataset.from_list([json.loads(row) for row in content.splitlines()])


def read_text(line: Line) -> str:
    """What cpt.py makes of a line's files in the working directory."""
    options = {name: line.options[name] for name in ("text_field", "weight") if name in line.options}
    try:
        source = TextSource(**_place(line), **options, streaming=line.options.get("streaming") == "true")
        documents = [row["text"] for row in load_source(source)]
    except (ValueError, TypeError) as error:
        return f"refused: {_without_folder(str(error))}"
    return f"documents: {', '.join(f'`{document}`' for document in documents)}".replace("\n", "\\n")


def choose_heldout_split(line: Line) -> str:
    """Which split of a line's files in the working directory is held out where none is named."""
    try:
        return f"the split `{default_heldout_split(_place(line)['path'])}`"
    except ValueError as error:
        return f"refused: {error}"


def read_instructions(line: Line) -> str:
    """What sft.py makes of a line's files in the working directory."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = line.options.get("chat_template", CHATML).replace("\\n", "\n")
    options = {name: line.options[name] for name in SETTINGS if name in line.options}
    options["max_length"] = int(options["max_length"]) if "max_length" in options else None
    try:
        settings = InstructionSettings(**options, end_token_ids=frozenset({tokenizer.eos_token_id}))
        source = DataSource(**_place(line))
        rows, _ = prepare_instructions(load_rows(source), tokenizer, settings, source.label)
    except (ValueError, TypeError) as error:
        return f"refused: {_without_folder(str(error))}"
    texts = [text for row in rows for text in _trained(row, tokenizer)]
    return f"trained: {', '.join(f'`{text}`' for text in texts)}".replace("\n", "\\n")


def _place(line: Line) -> dict[str, str]:
    """The path that a recipe is given: a pattern, the only file, or the folder that holds all; and how to read it."""
    is_whole = "*" in line.files[-1] or (len(line.files) == 1 and "/" not in line.files[0].rstrip("/"))
    path = line.files[-1].rstrip("/") if is_whole else Path(line.files[0]).parts[0]
    names = {"dataset_config": "name", "dataset_split": "split", "dataset_encoding": "encoding"}
    return {"path": path, **{names[name]: value for name, value in line.options.items() if name in names}}


def _trained(row: dict, tokenizer) -> list[str]:
    """The texts of the stretches that are trained."""
    pairs = zip(row["input_ids"], row["labels"])
    groups = groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL)
    return [tokenizer.decode([token for token, _ in group]) for is_trained, group in groups if is_trained]


def _without_folder(sentence: str) -> str:
    return sentence.replace(str(Path.cwd()), "FOLDER")
