"""The page's server, in a thread of this process or in a process of its own."""

import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import uvicorn

from parscale_adapt.page.server import Page
from support.recipe_runs import end_group, environment, free_port


SECONDS_TO_START = 120


class PageServer:
    """A page at `address`, served by a thread until it is closed."""

    def __init__(self, page: Page):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            page.app("127.0.0.1"), "127.0.0.1", self.port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + SECONDS_TO_START
        while not self._server.started:
            assert time.monotonic() < end
            time.sleep(0.02)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request, which is a question where there is a body."""
        connection = self.connect(path, body, **headers)
        response = connection.getresponse()
        answer = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        connection.close()
        return answer

    def connect(self, path: str, body: object = None, **headers: str) -> http.client.HTTPConnection:
        """A request whose answer was not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None:
            connection.request("GET", path, headers=sent)
        else:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, content, {"Content-Type": "application/json", **sent})
        return connection


class PageCommand:
    """`parscale page` in a process of its own; `seconds_to_paint` can be counted from `ready_at`."""

    def __init__(self, folder: Path, *arguments: object):
        self.log = folder / "page.log"
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        code = "from parscale_adapt.cli import main; main()"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "page", *map(str, arguments), "--port", str(port)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=folder,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while f"ready at {self.address} " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.05)
        self.ready_at = time.monotonic()

    def close(self) -> None:
        end_group(self.process)
