"""Programs that stay loaded and take turns: they do their work once for every line that they are sent."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence


class TurnTaker:
    """One of them, such as tests/native/probe.cpp with --turns 1. Each turn answers with a line."""

    def __init__(
        self,
        command: Sequence[object],
        env: Mapping[str, str] | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        self._child = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            preexec_fn=preexec_fn,
        )  # fmt: skip

    def begin(self) -> None:
        assert self._child.stdin
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def ask(self) -> str:
        """Begins a turn, and waits for its line."""
        self.begin()
        return self.answer()

    def answer(self) -> str:
        """Waits for the line of the turn that was begun."""
        assert self._child.stdout
        return self._child.stdout.readline()

    def close(self) -> None:
        """Waits for the end of the turn that was begun, if any."""
        self._child.communicate()
