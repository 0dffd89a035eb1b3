"""`parscale serve`: an existing server for a checkpoint with streams."""

from enum import StrEnum
from typing import Annotated

import typer


class Engine(StrEnum):
    """Whose server runs."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="Folder that `parscale export` made, or of a published checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    engine: Annotated[Engine, typer.Option(help="Whose server to run.")] = Engine.TRANSFORMERS,
) -> None:
    """Serve an export with an OpenAI-compatible API, by `transformers serve` or by vLLM.

    The folder comes first; all options after it that are not listed here go to the server as they are, such as --device
    cuda, --dtype bfloat16 or --continuous-batching (see `transformers serve --help`, or `vllm serve --help`).

    A standalone export brings its code, which parscale_adapt wrote there; transformers runs it (vLLM doesn't), so serve
    only folders whose origin you trust.
    """
    from ..serving.launcher import serve as start_transformers
    from ..serving.launcher import serve_by_vllm

    start = serve_by_vllm if engine is Engine.VLLM else start_transformers
    start(folder, host, port, context.args)
