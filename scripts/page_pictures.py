"""Pictures of the page's four tabs, for docs/page.md and the README.

    python scripts/page_pictures.py                      # of what `make demo` left in runs/demo
    python scripts/page_pictures.py --demo FOLDER        # the same elsewhere

Needs Chromium (`make test-page` installs it). Prints how long after the server's "ready" the first paint came.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from parscale_adapt.page.demo import find_demo


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
QUESTION = "    def __init__(self, name, value=None):"
LONGEST = 72
# What background work of Chromium would ask other hosts, and what a container lacks.
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Server:
    """`parscale page` until it is closed."""

    def __init__(self, model: str, adapters: list[str], runs: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        named = [word for adapter in adapters for word in ("--adapter", adapter)]
        code = "from parscale_adapt.cli import main; main()"
        command = [sys.executable, "-c", code, "page", model, *named, "--runs", str(runs), "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        while "ready" not in (line := self.process.stdout.readline()):
            if not line:
                raise SystemExit("the page did not start")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def take(page: Page, name: str, height: int) -> None:
    """The upper part of the tab, in which everything is seen that it is about."""
    page.set_viewport_size({"width": 1180, "height": height})
    page.wait_for_timeout(300)
    page.screenshot(path=IMAGES / f"page_{name}.png")
    print(f"docs/images/page_{name}.png", flush=True)


def take_all(page: Page) -> None:
    page.wait_for_selector("#ask:not([disabled])")
    page.click("#settings summary")
    page.fill("#max-new-tokens", str(LONGEST))
    page.locator("#temperature").fill("0.6")
    page.fill("#seed", "1")
    page.click("#settings summary")
    page.fill("#question", QUESTION)
    page.click("#compare")
    page.wait_for_selector(".answer dl")
    page.set_viewport_size({"width": 1180, "height": 900})
    page.evaluate("scrollTo(0, 0)")
    take(page, "chat", 900)
    page.get_by_role("button", name="See the streams").last.click()
    page.locator(".token").nth(12).hover()
    take(page, "streams", 520)
    page.click("#tab-law")
    page.wait_for_selector("#law-chart svg")
    take(page, "law", 860)
    page.click("#tab-runs")
    page.wait_for_selector("#run-loss svg")
    take(page, "runs", 800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="What `make demo` left.")
    demo = parser.parse_args().demo
    model, adapters = find_demo(demo)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        tab = browser.new_page(color_scheme="light")
        tab.set_default_timeout(1_200_000)
        server = Server(model, adapters, demo)
        since = time.monotonic()
        try:
            tab.goto(server.address)
            tab.wait_for_selector("#ask")
            waited = time.monotonic() - since
            paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            print(
                f"first paint {paint:.0f} ms after the request, drawn and seen {waited:.2f} s after ready", flush=True
            )
            take_all(tab)
        finally:
            server.close()
            browser.close()


if __name__ == "__main__":
    main()
