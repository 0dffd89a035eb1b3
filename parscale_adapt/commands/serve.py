"""`parscale serve`: transformers' own server for a checkpoint with streams."""

from typing import Annotated

import typer


def serve(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="Folder that `parscale export` made, or of a published checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve an export with an OpenAI-compatible API, by `transformers serve`.

    The folder comes first; all options after it that are not listed here go to `transformers serve` as they are, such
    as --device cuda, --dtype bfloat16 or --continuous-batching (see `transformers serve --help`).

    A standalone export brings its code, which parscale_adapt wrote there; this command runs it, so serve only folders
    whose origin you trust.
    """
    from ..serving.launcher import serve as start

    start(folder, host, port, context.args)
