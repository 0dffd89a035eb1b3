"""The server of the page: static files, figures as JSON, and answers as lines of JSON while they come."""

import asyncio
import json
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .guard import Guard
from .law import LawDesk
from .questions import read_messages, read_question, read_tokens
from .resident import Resident
from .runs import RunReader


STATIC = Path(__file__).parent / "static"


class Page:
    """What the routes answer from.

    Args:
        resident: the model.
        law: answers the law's figures.
        runs: reads folders of runs.
    """

    def __init__(self, resident: Resident, law: LawDesk, runs: RunReader):
        self.resident = resident
        self.law = law
        self.runs = runs

    async def status(self, request: Request) -> Response:
        """The model and its voices."""
        return JSONResponse(self.resident.status())

    async def answer(self, request: Request) -> Response:
        """One answer, or several side by side, as lines of JSON; it ends when the visitor leaves."""
        body = await _body(request)
        answers = self.resident.answers()
        question, voices = read_question(body), answers.named(body.get("voices"))
        run = partial(answers.answer, question, voices)
        return StreamingResponse(_events(run), media_type="application/x-ndjson")

    async def streams(self, request: Request) -> Response:
        """The streams at each token of an answer."""
        body = await _body(request)
        answers = self.resident.answers()
        (voice,) = answers.named([body.get("voice")])
        vocabulary = answers.model.config.get_text_config().vocab_size
        tokens = read_tokens(body.get("tokens"), vocabulary)
        messages = read_messages(body.get("messages"))
        return JSONResponse(await run_in_threadpool(answers.streams, messages, voice, tokens))

    async def law_choices(self, request: Request) -> Response:
        """Laws, devices and sizes."""
        return JSONResponse(await run_in_threadpool(self.law.choices))

    async def law_figures(self, request: Request) -> Response:
        """What a law says of one choice."""
        return JSONResponse(await run_in_threadpool(self.law.figures, dict(request.query_params)))

    async def run_list(self, request: Request) -> Response:
        """The runs, with their last figures."""
        return JSONResponse(await run_in_threadpool(self.runs.overview))

    async def run_details(self, request: Request) -> Response:
        """The curves of one run."""
        return JSONResponse(await run_in_threadpool(self.runs.details, request.query_params.get("run", "")))

    def app(self, host: str) -> Guard:
        """The application, for a server that listens on `host`."""
        routes = [
            Route("/", _index),
            Route("/api/status", self.status),
            Route("/api/answer", self.answer, methods=["POST"]),
            Route("/api/streams", self.streams, methods=["POST"]),
            Route("/api/law/choices", self.law_choices),
            Route("/api/law", self.law_figures),
            Route("/api/runs", self.run_list),
            Route("/api/run", self.run_details),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        return Guard(Starlette(routes=routes, exception_handlers={ValueError: _refusal}), host)


def serve(page: Page, host: str, port: int) -> None:
    """Serve the page until the process is asked to end; one line says where it is, once it answers."""
    shown = f"[{host}]" if ":" in host else host
    _Server(
        uvicorn.Config(page.app(host), host=host, port=port, log_level="warning", timeout_graceful_shutdown=1),
        f"The page is ready at http://{shown}:{port} (Ctrl-C ends it).",
    ).run()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, welcome: str):
        super().__init__(config)
        self._welcome = welcome

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """Listen, and say so."""
        await super().startup(*args, **kwargs)
        print(self._welcome, flush=True)


async def _index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


async def _refusal(request: Request, error: Exception) -> Response:
    return JSONResponse({"problem": str(error)}, 400)


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise ValueError(f"The request is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise ValueError("The request must be a JSON object.")
    return body


async def _events(run: Callable[[Callable[[dict[str, Any]], None], threading.Event], None]) -> AsyncIterator[str]:
    """Lines of JSON from what `run` emits in a thread of its own; if nobody reads on, it is told to stop."""
    loop, stopped = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def emit(event: dict[str, Any] | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, event)

    def work() -> None:
        try:
            run(emit, stopped)
        except ValueError as error:
            emit({"event": "problem", "problem": str(error)})
        except Exception as error:
            traceback.print_exc()
            print("parscale: an answer ended in this error.", file=sys.stderr, flush=True)
            emit({"event": "problem", "problem": f"The answer ended in an error ({type(error).__name__}): {error}"})
        finally:
            emit(None)

    threading.Thread(target=work, name="answer", daemon=True).start()
    try:
        while (event := await queue.get()) is not None:
            yield json.dumps(event) + "\n"
    finally:
        stopped.set()
