"""`parscale inspect-data`: what a recipe would make of some data, before a GPU is rented."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_writable, hide_progress_bars, write_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.preview import Preview

_MAX_PROBLEMS = 5
_TRL_MAX_LENGTH = 1024  # what the recipes take where none is given


def inspect_data(
    files: Annotated[list[str], typer.Argument(help="Files, globs, folders or hub datasets.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Backbone whose tokens are counted: folder or hub name (default: bytes).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="sft or cpt (default: the one that reads the columns of the first row).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help=f"Tokens per row, as of the recipe (default: {_TRL_MAX_LENGTH}).", min=2)
    ] = None,
    train_on: Annotated[str, typer.Option(help="last_answer, all_answers or all_text.")] = "last_answer",
    prompt_field: Annotated[str, typer.Option(help="Column with the question.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Column with the answer.")] = "completion",
    text_field: Annotated[str, typer.Option(help="Column with raw text.")] = "text",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split to look at.")] = "train",
    encoding: Annotated[str, typer.Option(help="Encoding of local text files.")] = "utf-8",
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    eos_token: Annotated[str | None, typer.Option(help="Token of the tokenizer that ends answers.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to look at in each, from the first.", min=1)] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Show format, first example with the trained part marked, token counts, and what would be cut, dropped or refused.

    Reads by the same functions as the recipes. Ends with exit code 1 if a recipe would refuse the data.
    """
    check_writable(json_file)
    if recipe not in (None, "sft", "cpt"):
        raise ValueError(f"`recipe` must be sft or cpt, got {recipe!r}.")
    if tokenizer is None and (max_length is not None or eos_token is not None):
        raise ValueError("`max_length` and `eos_token` speak of tokens: name the backbone with --tokenizer.")
    hide_progress_bars()
    from ..data import DataSource, InstructionSettings, end_token_ids
    from ..data.preview import PreviewSettings, preview

    counter = _load_tokenizer(tokenizer, eos_token, chat_template)
    length = None if tokenizer is None else max_length or _TRL_MAX_LENGTH
    ends = end_token_ids(counter, tokenizer)
    instructions = InstructionSettings(length, train_on, prompt_field, completion_field, end_token_ids=ends)
    settings = PreviewSettings(instructions, text_field, rows, None if recipe is None else f"{recipe}.py")
    found = []
    for file in files:
        source = DataSource(file, config, split, streaming="[" not in split, encoding=encoding)
        found.append(preview(source, counter, settings))
        _show(found[-1], rows, length)
    counted_in = "bytes" if length is None else "tokens"
    write_json(json_file, {"counted_in": counted_in, "sources": [one.to_dict() for one in found]})
    if any(one.problems for one in found):
        sys.exit(1)


def _load_tokenizer(path: str | None, eos_token: str | None, chat_template: str | None) -> "PreTrainedTokenizerBase":
    from ..checkpoints.whole import check_model_files
    from ..data import TokenizerSettings, load_tokenizer, set_chat_template
    from ..data.preview import byte_tokenizer

    if path is None:
        print(
            "Counted in bytes, about 4 of which make a token of English; --tokenizer counts tokens, and what is cut."
        )
        tokenizer = byte_tokenizer()
    else:
        if Path(path).is_dir():
            check_model_files(Path(path))
        tokenizer = load_tokenizer(path, TokenizerSettings(eos_token=eos_token))
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def _show(found: "Preview", num_rows: int, max_length: int | None) -> None:
    from ..terminal import console

    print(f"\n{found.name}")
    for line in _lines(found, num_rows, max_length):
        print(f"  {line}")
    if found.example is not None:
        console().print(found.example)
    for problem in found.problems[:_MAX_PROBLEMS]:
        print(f"  can't be used: {problem}")
    if len(found.problems) > _MAX_PROBLEMS:
        print(f"  and {len(found.problems) - _MAX_PROBLEMS:,} more rows that can't be used")


def _lines(found: "Preview", num_rows: int, max_length: int | None) -> list[str]:
    figures = found.to_dict()
    count = figures["rows"]
    lines = [
        f"format:   {found.format or 'not read'}, for {found.recipe}",
        f"rows:     {count:,}" + (" (the first; --rows looks at more)" if count == num_rows else ""),
    ]
    if found.lengths:
        unit = "bytes:   " if max_length is None else "tokens:  "
        shortest, middle, longest = figures["tokens_per_row"]
        lines += [
            f"{unit} {figures['tokens']:,}, of which {found.num_trained:,} are trained; a row has {shortest:,} to "
            f"{longest:,}, half of the rows up to {middle:,.0f}"
        ]
    for what, number in (("dropped: ", found.num_dropped), ("cut:     ", found.num_cut)):
        if number:
            lines.append(f"{what} {number:,} of {count:,} rows, longer than {max_length:,} tokens")
    if found.unused:
        names = ", ".join(f"{name} ({number:,} rows)" for name, number in sorted(found.unused.items()))
        lines.append(f"not read: {names}")
    return lines
