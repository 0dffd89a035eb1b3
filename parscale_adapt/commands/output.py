"""What commands share for their results: tables on the terminal, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_text


def check_writable(*paths: Path | None, pictures: Sequence[Path | None] = ()) -> None:
    """Refuse output files that could not be written, before the work that fills them.

    Raises:
        ValueError: the folder is missing, the path is a folder, or a picture has a name that is not one of a PNG.
    """
    for picture in pictures:
        if picture is not None and picture.suffix.lower() != ".png":
            raise ValueError(f"The name of a picture must end in .png, got {picture}: pictures are written as PNG.")
    for path in (*paths, *pictures):
        if path is not None and path.is_dir():
            raise ValueError(f"An output must be a file, got the folder {path}: give a file name.")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(
                f"An output must be in a folder that is there, got {path}: {path.absolute().parent} does not exist, create "
                "it first."
            )


def write_json(path: Path | None, values: Mapping[str, object]) -> None:
    """Write a JSON file if a path was given. Numbers that JSON lacks (infinity) are an error, not a surprise."""
    if path is not None:
        write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: first column to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..terminal import console

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def hide_progress_bars() -> None:
    """Keep the progress bars of transformers out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
