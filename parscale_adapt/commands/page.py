"""`parscale page`: chat, streams, law and runs in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from .law_source import use_one_blas_thread
from .output import hide_progress_bars


def page(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Backbone, export, published checkpoint or adapter: folder or hub name (default: what `make demo` left)."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH or PATH of an adapter to load as well; can be given again.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder with runs of the recipes, also of those that train now.")] = Path(
        "runs"
    ),
    law: Annotated[str | None, typer.Option(help="Your own scaling law: a file of fit-law --json.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; whoever can reach it can use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
) -> None:
    """Serve a page to try a model: answers of P streams side by side, each stream's say, the law, one's own runs.

    A standalone export brings its code, which parscale_adapt wrote there; this command runs it, so open only folders
    whose origin you trust.
    """
    hide_progress_bars()
    use_one_blas_thread()
    _check_packages()
    from ..page.demo import find_demo
    from ..serving.launcher import check_address

    check_address(host, port)
    model, adapters = find_demo() if path is None else (path, adapter or [])
    if path is None and adapter:
        raise ValueError(
            "`--adapter` goes on a backbone, and none was given: `parscale page MODEL --adapter NAME=PATH`."
        )
    from ..page.law import LawDesk
    from ..page.resident import Resident
    from ..page.runs import RunReader
    from ..page.server import Page, serve
    from ..serving.loading import find_speaker

    resident = Resident(find_speaker(model, adapters=adapters))
    desk = LawDesk(law, resident.speaker.backbone_folder)
    resident.start()
    serve(Page(resident, desk, RunReader(runs)), host, port)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The page needs {' and '.join(missing)}: install what it needs with `pip install '.[page]'`."
        )
