"""The most that a number was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

PERIOD_S = 0.02  # between two looks


class Peak:
    """Looks from a thread until it is closed; what cannot be read then is left out."""

    def __init__(self, read: Callable[[], int]) -> None:
        """Raises: what `read` raises."""
        self._read = read
        self.first = self.most = read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.most = max(self.most, self._read())

    def close(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._look()

    def rise(self) -> int:
        """Above what was first."""
        self.close()
        return self.most - self.first
