"""Programs that end with the process that started them, however that one ends.

Ray ends its workers with SIGKILL, and nobody is left then who would stop what they have started. The kernel can do it
(PR_SET_PDEATHSIG), if the program asks for it itself: this module is run as one that asks, and becomes the program.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn

from .._closing import Closing

PR_SET_PDEATHSIG = 1
SIGKILL = 9
END_S = 10  # that a program has between SIGTERM and SIGKILL
LOG_TAIL = 16_384  # bytes of a log that are looked through for a reason


class Tied(Closing):
    """A program that runs, with what it has written. It ends with close(), and with this process."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # open as long as the program writes
        command = [sys.executable, "-m", __name__, str(os.getpid()), *words] if sys.platform == "linux" else [*words]
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        # the kernel ends the program with the thread that made it: so that one waits until the program has ended
        self._thread = threading.Thread(target=self._own, args=(command, dict(environment)), daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _own(self, command: list[str], environment: dict[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )
        except OSError as e:
            self._error = e
        self._started.set()
        if self._process is not None:
            self._process.wait()
        self._ended.set()

    @property
    def pid(self) -> int:
        """The process; the program's own, once it has become that."""
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.returncode if self._process is not None and self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        return self._ended.wait(timeout)

    def words(self) -> str:
        """What it has written, of which the end is kept where it is long."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), LOG_TAIL, max(0, size - LOG_TAIL)).decode("utf-8", "replace")

    def end(self) -> str:
        """How it ended, with its reason where it said one."""
        code = self.code
        if code is not None and code < 0:
            return f"ended by signal {-code}"
        return f"ended with code {code}: {self.last_words()}"

    def last_words(self) -> str:
        """What it has written of an error, or at all, at the end."""
        from .._engine.starting import last_words  # a process that becomes a program needs none of it

        return last_words(self.words())

    def close(self) -> None:
        """End it, and wait for that. Twice is fine."""
        if self._process is not None and not self._ended.is_set():
            self._process.terminate()
            if not self._ended.wait(END_S):
                self._process.kill()
        self._thread.join()


def _become(parent: int, words: Sequence[str]) -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        sys.exit(f"superllama: {words[0]} cannot be tied to process {parent}: {os.strerror(error)}")
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(f"superllama: {words[0]}: process {parent}, which started it, is gone")
    os.execv(words[0], list(words))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
