"""The `parscale` command: assembles the commands of `parscale_adapt.commands`, one module for each.

A command is a function with typer annotations; add it to `COMMANDS`. It raises ValueError (or OSError) with one
sentence for bad input, which `main` prints without a traceback. Command modules import nothing heavy at the top, so
that `--help` and `--version` answer at once.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from .commands.chat import chat
from .commands.cost import cost
from .commands.diagnose import diagnose
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.fit_law import fit_law
from .commands.foreign_messages import drop_foreign_messages
from .commands.import_checkpoint import import_checkpoint
from .commands.inspect import inspect
from .commands.inspect_data import inspect_data
from .commands.page import page
from .commands.predict import predict
from .commands.serve import serve
from .commands.verify import verify
from .version import __version__


COMMANDS: dict[str, Callable[..., None]] = {
    "fit-law": fit_law,
    "predict": predict,
    "cost": cost,
    "diagnose": diagnose,
    "evaluate": evaluate,
    "import": import_checkpoint,
    "export": export,
    "verify": verify,
    "inspect": inspect,
    "inspect-data": inspect_data,
    "chat": chat,
    "serve": serve,
    "page": page,
}
# Commands that hand options which they don't know over to another program.
HANDING_OVER = {"serve"}

app = typer.Typer(
    name="parscale",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # The recipes, as transformers does, spell --num_streams what other programs spell --num-streams: here both are one.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
for _name, _command in COMMANDS.items():
    _hands_over = _name in HANDING_OVER
    _settings = {"allow_extra_args": _hands_over, "ignore_unknown_options": _hands_over}
    app.command(_name, context_settings=_settings)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"parscale_adapt {__version__}")
        raise typer.Exit()


@app.callback()
def _parscale(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Parallel scaling (ParScale) for causal language models."""


def main() -> None:
    """Run the command line; bad input ends in one sentence on stderr and exit code 1 (2 for wrong usage)."""
    drop_foreign_messages()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("PARSCALE_TRACEBACK"):
            raise
        print(f"parscale: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
