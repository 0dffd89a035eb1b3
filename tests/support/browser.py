"""Debian's Chromium without a window, and pages in it that must cause no error and ask no other host."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright


_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The lowest contrast of visible text on what lies behind it (WCAG 2.2, 1.4.3), with that text; opaque layers end the search.
_LOWEST_CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (top, under) => [0, 1, 2].map((part) => top[part] * top[3] + under[part] * (1 - top[3])).concat(1);
  const light = (color) => {
    const [red, green, blue] = color.map((part) => part / 255).map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), parse(getComputedStyle(document.body).backgroundColor));
  };
  let lowest = { contrast: 21, text: "" };
  let count = 0;
  const see = (element, color, text) => {
    const ground = behind(element);
    const [high, low] = [light(over(parse(color), ground)), light(ground)].sort((one, other) => other - one);
    const contrast = (high + 0.05) / (low + 0.05);
    count += 1;
    if (contrast < lowest.contrast) lowest = { contrast, text };
  };
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (!box.width || !box.height || style.visibility === "hidden" || element.closest("option")) continue;
    const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.textContent.trim()).join("");
    const field = element.matches("textarea, input[type=number], select") ? element.value : "";
    if (own || field) see(element, element instanceof SVGElement ? style.fill : style.color, own || field);
    if (element.matches("textarea") && !element.value) see(element, getComputedStyle(element, "::placeholder").color, element.placeholder);
    for (const part of ["::before", "::after"]) {
      const made = getComputedStyle(element, part);
      if (!["none", "normal"].includes(made.content)) see(element, made.color, `${part} ${made.content}`);
    }
  }
  return { ...lowest, count };
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of its own."""
    path = shutil.which("chromium")
    assert path is not None, "Chromium is not installed: `apt-get install chromium`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_OPTIONS)
        yield browser
        browser.close()


class Tabs:
    """Opens tabs at one address; at the end, nothing may have been logged as an error or asked elsewhere.

    Args:
        browser: that shows them.
        address: of the page.
    """

    def __init__(self, browser: Browser, address: str):
        self.address = address
        self.troubles: list[str] = []
        self.num_requests = 0
        self._browser = browser
        self._contexts: list[Any] = []

    def open(self, hash: str = "", **options: Any) -> Page:
        """A tab that waits for the model, in a window of its own; options are those of Playwright's `new_context`."""
        size = {"width": 1200, "height": 800}
        context = self._browser.new_context(**{"viewport": size, "color_scheme": "light", **options})
        context.set_default_timeout(60_000)
        self._contexts.append(context)
        return self.open_beside(context, hash)

    def open_beside(self, context: Any, hash: str = "") -> Page:
        """Another tab of the same window."""
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and self.troubles.append(message.text))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", self._see)
        page.goto(self.address + hash)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        assert self.troubles == []
        assert self.num_requests > 0

    def _see(self, request: Any) -> None:
        self.num_requests += 1
        if not request.url.startswith(f"{self.address}/"):
            self.troubles.append(f"asked {request.url}")


def lowest_contrast(page: Page) -> tuple[float, str, int]:
    """Lowest contrast of text that is shown, that text, and of how many pieces."""
    found = page.evaluate(_LOWEST_CONTRAST)
    return found["contrast"], found["text"], found["count"]


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
