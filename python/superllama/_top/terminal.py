"""A terminal that one picture has for itself: keys as they are pressed, resizes, and all as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import termios
import tty
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.control import Control
from rich.segment import Segment, Segments

if TYPE_CHECKING:
    from typing_extensions import Self

REDRAW, QUIT = "redraw", "quit"  # beside keys, what wait() tells
ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[ -~]|O.|.)?")  # arrows and the like
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)


class Terminal:
    """Within its with block, the other screen without a cursor. Signals come out of wait(), so that nothing is in the
    middle of something when they are heard; for the main thread only, which hears them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._input = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self.hears_keys = self._input is not None
        self._heard, self._hears = os.pipe()
        os.set_blocking(self._hears, False)

    def __enter__(self) -> Self:
        self._modes = termios.tcgetattr(self._input) if self._input is not None else []
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self._take()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._give_back()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._heard)
            os.close(self._hears)

    def draw(self, picture: RenderableType) -> None:
        """Fill the screen with it."""
        console = self.console
        width, height = console.size
        lines = console.render_lines(picture, console.options.update(width=width, height=height))
        lines = Segment.set_shape(lines, width, height)
        segments = [segment for line in lines for segment in (*line, Segment.line())]
        with console:  # one write
            console.control(Control.home())
            console.print(Segments(segments[:-1]), end="")  # the last one would scroll

    def wait(self, seconds: float) -> list[str]:
        """Keys, QUIT and REDRAW as they come; empty if nothing does. Raises: SystemExit on SIGTERM and SIGHUP."""
        readable = [self._heard] if self._input is None else [self._heard, self._input]
        ready, _, _ = select.select(readable, [], [], seconds)
        found: list[str] = []
        if self._heard in ready:
            for number in os.read(self._heard, 64):
                found.append(self._after(number))
        if self._input in ready:
            found += self._keys()
        return found

    def _keys(self) -> list[str]:
        assert self._input is not None
        try:
            pressed = os.read(self._input, 64)
        except OSError:
            pressed = b""
        if not pressed:  # the terminal is gone
            return [QUIT]
        return list(ESCAPES.sub(b"", pressed).decode("utf-8", "replace"))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # thousands of them wait already
            os.write(self._hears, bytes([number]))

    def _after(self, number: int) -> str:
        if number in (signal.SIGTERM, signal.SIGHUP):
            raise SystemExit(128 + number)
        if number == signal.SIGINT:
            return QUIT
        if number == signal.SIGTSTP:
            self._stop()
        elif number == signal.SIGCONT:
            self._take()  # a shell has put back its own modes meanwhile
        return REDRAW

    def _stop(self) -> None:
        """What Ctrl-Z does without us, with the terminal as it was; returns when the process goes on."""
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._on_signal)
        self._take()

    def _take(self) -> None:
        if self._input is not None:
            tty.setcbreak(self._input)
        self.console.set_alt_screen(True)
        self.console.show_cursor(False)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError, termios.error):  # of a terminal that is gone
            if self._input is not None:
                termios.tcsetattr(self._input, termios.TCSADRAIN, self._modes)
            self.console.show_cursor(True)
            self.console.set_alt_screen(False)
