"""docs/data.md: each line of its tables does what it says, and no refusal of data is missing."""

import ast
import pathlib
import re

import datasets
import pytest
from support.data_docs import choose_heldout_split, lines_of, read_instructions, read_text, write_files

from parscale_adapt.data.saying import say


ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "data.md"
READERS = {
    "Files": read_text,
    "Folders and splits": read_text,
    "Held-out data": choose_heldout_split,
    "Questions and answers": read_instructions,
    "What is trained": read_instructions,
    "Refused files": read_text,
    "Refused rows": read_instructions,
    "Refused by the chat template": read_instructions,
}
LINES = [(reader, line) for heading, reader in READERS.items() for line in lines_of(DOCUMENT, heading)]
READING_MODULES = (
    "local_files",
    "row_files",
    "sources",
    "messages",
    "conversations",
    "chat_template",
    "instruction_rows",
    "instructions",
)


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """An empty working directory and cache; calling it gives what was told since."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    say.cache_clear()
    capsys.readouterr()
    return lambda: " ".join(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(("reader", "line"), LINES, ids=[f"{number}" for number in range(len(LINES))])
def test_each_line_does_what_it_says(reader, line, told):
    write_files(line)
    outcome = reader(line)
    sentences = told()
    assert outcome + (f"; told: {sentences}" if sentences else "") == line.outcome


def patterns():
    """A regular expression for each sentence with which data is refused, made of what its f-string says."""
    for name in READING_MODULES:
        for node in ast.walk(ast.parse((ROOT / "parscale_adapt" / "data" / f"{name}.py").read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                parts = node.exc.args[0].values if isinstance(node.exc.args[0], ast.JoinedStr) else node.exc.args
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                if texts:
                    yield pytest.param(
                        ".*".join(re.escape(text.strip()) for text in texts), id=f"{name}-{node.lineno}"
                    )


@pytest.mark.parametrize("pattern", patterns())
def test_no_refusal_is_missing(pattern):
    assert re.search(pattern, " ".join(DOCUMENT.read_text().replace("\\|", "|").split()))
