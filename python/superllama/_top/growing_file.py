"""A metrics file that a program writes, followed as it grows: its lines, from the last ones there on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import Error
from .._files import open_regular
from .rates import Sample

TAIL = 1 << 19  # bytes of it that are read first: some minutes, at a line a second


class GrowingFile:
    """What was read of a file, and what of a line is there so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._position = 0
        self._half = b""

    def lines(self) -> list[dict[str, Any]]:
        """The metrics that were written since the last call. Raises: Error where there is no such file."""
        try:
            file = self._opened()
            if file.seek(0, os.SEEK_END) < (read := self._position):
                read, self._half = 0, b""  # truncated, and written anew
            file.seek(read)
            text = self._half + file.read()
            self._position = file.tell()
        except OSError as e:
            self.close()
            raise Error(f"{self.path}: no metrics can be read: {e.strerror or e}") from e
        whole, newline, rest = text.rpartition(b"\n")
        self._half = rest if newline else text
        return [found for line in whole.splitlines() if (found := _metrics(line))]

    def close(self) -> None:
        """The next call reads from the file that has the name then."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _opened(self) -> BinaryIO:
        """The file of this name, which may be another one than before."""
        if self._file is not None and not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            self.close()
        if self._file is None:
            self._file = open_regular(self.path, Error)
            self._half = b""
            self._position = max(0, self.path.stat().st_size - TAIL)
        return self._file


def _metrics(line: bytes) -> dict[str, Any] | None:
    """None for what is no line of metrics: a piece of one, or another line of a log."""
    from .._metrics import PREFIX  # with pydantic, which a server's `top` does not need

    try:
        found = json.loads(line.removeprefix(PREFIX))
        Sample.of(found)
    except ValueError:
        return None
    return dict(found)
