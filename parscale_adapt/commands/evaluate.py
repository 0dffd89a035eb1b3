"""`parscale evaluate`: score a backbone and its adapters on the same tasks and texts."""

from pathlib import Path
from typing import Annotated

import typer

from .output import hide_progress_bars


def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file: backbone, adapters, tasks, texts (docs/evaluation.md).")],
    backbone: Annotated[str | None, typer.Option(help="Instead of the file's: folder or hub name.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Instead of the file's: NAME=PATH or PATH; can be given again.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Instead of the file's: folder of the scores.")] = None,
    execute_code: Annotated[
        str | None,
        typer.Option(help="Run the programs that models wrote, by EvalPlus: the Python of its environment."),
    ] = None,
    write_cards: Annotated[
        bool, typer.Option("--write-cards", help="Put the scores into the model cards of the adapters.")
    ] = False,
) -> None:
    """Score a backbone and adapters in one process: lm-eval's tasks, loss on text, forgetting, programs, beam search.

    Each score has an interval, and each difference is paired. What is finished is not scored again, so that a killed
    evaluation goes on where it stopped.
    """
    hide_progress_bars()
    from ..evaluation.evaluating import evaluate as score
    from ..evaluation.report import show_report
    from ..evaluation.settings import read_settings

    settings = read_settings(
        config,
        backbone=backbone,
        adapters=adapter or None,
        output_dir=output_dir,
        execute_code=execute_code,
        write_cards=write_cards or None,
    )
    show_report(score(settings))
