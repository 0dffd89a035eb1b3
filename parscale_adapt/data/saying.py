"""What is told on the way to the first step: by the main process alone, each sentence once."""

from __future__ import annotations

import functools
import os


@functools.cache
def say(sentence: str) -> None:
    """Print a sentence if this is the main process and it was not printed before."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, flush=True)
