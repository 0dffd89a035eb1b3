"""Several threads that use one model, one at a time."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that goes to whoever has waited longest, and that its holder can pass on and get back later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_taken = False

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Wait for a turn and hold it inside the block."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def pass_on(self) -> None:
        """By the holder: let all who wait now have a turn, and wait for the next."""
        with self._lock:
            if not self._waiting:
                return
            mine = self._join()
            self._waiting.popleft().set()
        mine.wait()

    def _take(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = self._join()
        mine.wait()

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # who gets it, takes it
            else:
                self._is_taken = False

    def _join(self) -> threading.Event:
        mine = threading.Event()
        self._waiting.append(mine)
        return mine
