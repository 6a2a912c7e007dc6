"""A program under a terminal of its own, of 80 columns and 24 lines: what it draws, the keys that it hears, and how it
leaves the terminal.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence

HOME = "\x1b[H"  # before each picture
SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CURSOR, NO_CURSOR = "\x1b[?25h", "\x1b[?25l"
PATIENCE_S = 120


class Terminal:
    """`process` leads the session of a terminal whose other end is `fd`, with the modes `before` that it found."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int, before: list[object]) -> None:
        self.process, self.fd, self.before = process, fd, before
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self) -> bool:
        """What is written next; False if there is nothing more to come."""
        if not select.select([self.fd], [], [], 0.2)[0]:
            return self.process.poll() is None
        self.text += self._decode(os.read(self.fd, 65536))
        return True

    def picture(self) -> str:
        """The last one that is there as a whole, without colours."""
        parts = self.text.split(HOME)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", parts[-2] if len(parts) > 2 else "").replace("\r", "")

    def wait_for(self, text: str) -> str:
        """A picture with this text in it."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.picture():
            if not self.read() or time.monotonic() > end:
                raise AssertionError(
                    f"no {text!r} in the picture:\n{self.picture()}\nnor to come: {self.text[-2000:]!r}"
                )
        return self.picture()

    def wait_for_output(self, text: str) -> None:
        """Anything that is written."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.text:
            assert self.read() and time.monotonic() < end, self.text

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def modes(self) -> list[object]:
        """What a shell finds, and has to find as it was."""
        return termios.tcgetattr(self.fd)

    def end(self) -> int:
        """The exit code, when all that was written is read."""
        while self.read():
            pass
        return self.process.wait(PATIENCE_S)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def under_terminal(command: Sequence[object]) -> Iterator[Terminal]:
    ours, its = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(ours)
    names = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=_take_terminal,
        env=names | {"TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )
    try:
        yield Terminal(process, ours, before)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)
        os.close(its)
