"""The one model of the page: loaded while the page is served already, and what is said until then."""

import sys
import threading
import traceback
from typing import Any

from ..serving.loading import Speaker, load_speaker
from .answers import Answers


class Resident:
    """Loads a model in a thread of its own.

    Args:
        speaker: what to load; it was looked at before.
    """

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self._answers: Answers | None = None
        self._problem: str | None = None

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def answers(self) -> Answers:
        """The loaded model.

        Raises:
            ValueError: it is not loaded yet, or could not be.
        """
        if self._answers is None:
            raise ValueError(self._problem or f"{self.speaker.name} is being loaded: ask again in a moment.")
        return self._answers

    def status(self) -> dict[str, Any]:
        """What the page says of the model."""
        status: dict[str, Any] = {"model": self.speaker.name, "state": "loading", "problem": self._problem}
        if self._problem is not None:
            return status | {"state": "failed"}
        if self._answers is None:
            return status
        return status | {
            "state": "ready",
            "voices": [{"name": voice.name, "num_streams": voice.num_streams} for voice in self._answers.voices],
            "context": self._answers.context,
            "has_template": self._answers.tokenizer.chat_template is not None,
        }

    def _load(self) -> None:
        try:
            self._answers = Answers(*load_speaker(self.speaker))
        except Exception as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
                problem = f"{self.speaker.name} could not be loaded ({type(error).__name__}): {problem}"
            print(f"parscale: {problem}", file=sys.stderr, flush=True)
            self._problem = problem
