"""What commands share for their results: tables on the terminal, files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def check_writable(*paths: Path | None, pictures: Sequence[Path | None] = ()) -> None:
    """Refuse output files that could not be written, before the work that fills them.

    Raises:
        ValueError: the folder is missing, the path is a folder, or a picture has a name that is not one of a PNG.
    """
    for picture in pictures:
        if picture is not None and picture.suffix.lower() != ".png":
            raise ValueError(f"pictures are written as PNG: give {picture} a name that ends in .png")
    for path in (*paths, *pictures):
        if path is not None and path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder, give a file name")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(
                f"cannot write {path}: the folder {path.absolute().parent} does not exist, create it first"
            )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | None, values: Mapping[str, object]) -> None:
    """Write a JSON file if a path was given. Numbers that JSON lacks (infinity) are an error, not a surprise."""
    if path is not None:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: first column to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    # Piped output has no width of its own, and figures broken over lines are hard to read and to cut.
    Console(highlight=False, markup=False, width=None if console.is_terminal else 160).print(table)


def hide_progress_bars() -> None:
    """Keep the progress bars of transformers out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def size_text(num_params: float) -> str:
    """A number of parameters for reading, such as 1.57B."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num_params >= scale:
            return f"{num_params / scale:.2f}{unit}"
    return f"{num_params:.0f}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
