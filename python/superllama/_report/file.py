"""A metrics file as contexts: its lines, which of them belong together, and which are none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from .._errors import Error
from .._files import open_regular
from .._metrics import PREFIX
from .run import Line, Run

LONGEST = 1 << 22  # bytes of a line; ours have one or two thousand, and a few for each expert where they tell of them
GIVE_UP = 64 << 20  # bytes in which there is no metrics line
SILENT_S = 10.0  # a context that writes nothing for so long, while another one does, has ended without saying so


@dataclasses.dataclass
class MetricsFile:
    """What was found in a file."""

    path: Path
    runs: list[Run] = dataclasses.field(default_factory=list)  # of contexts, in the order of their first lines
    n_lines: int = 0
    n_skipped: int = 0  # lines that are none of metrics
    cut: bool = False  # it ends in the middle of a line

    def longest(self) -> int:
        """The number, from 1, of the context with the most tokens; of equals the last."""
        return max(range(len(self.runs)), key=lambda i: (self.runs[i].last.token, i)) + 1


def read_metrics(path: str | os.PathLike[str]) -> MetricsFile:
    """Read a file that --metrics-file wrote, or a program's log with --metrics.

    Several contexts may write into one file, one after the other or in turns, and no line says of which it is: it goes
    to the one whose counters it continues, and of several to that with the nearest number of tokens.

    Raises: Error if there is no metrics line in it, or if it is no regular file; OSError if it cannot be read.
    """
    found = MetricsFile(Path(path))
    with open_regular(path, Error) as file:
        for text, whole in _objects(file):
            found.n_lines += 1
            try:
                line = Line.model_validate_json(text)
            except ValidationError:
                if whole:
                    found.n_skipped += 1
                else:
                    found.cut = True
                if not found.runs and file.tell() > GIVE_UP:
                    raise _no_metrics(path, f"the first {GIVE_UP >> 20} MiB of it") from None
                continue
            _assign(line, found.runs)
    if not found.runs:
        if not found.n_lines:
            raise Error(f"{path} is empty: no line has been written yet; the first one comes after the first tokens")
        if found.cut and found.n_lines == 1:
            raise Error(f"{path} ends in the middle of its first line: a moment later there will be more")
        raise _no_metrics(path, "it")
    return found


def _no_metrics(path: str | os.PathLike[str], where: str) -> Error:
    return Error(
        f"{os.fspath(path)}: there is no metrics line in {where}; programs write them with --metrics-file FILE"
    )


def _objects(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """What should be one object each, and whether its end is there: a line, or the lines of an indented one."""
    begun: list[bytes] = []
    while piece := file.readline(LONGEST):
        text = piece.strip().removeprefix(PREFIX)
        if text == b"{" or (begun and len(begun) < 200):
            if text == b"{" and begun:
                yield b"".join(begun), True  # whose end is not there, but something else
                begun = []
            begun.append(text)
            if text == b"}":
                yield b"".join(begun), True
                begun = []
        elif text:
            yield text, piece.endswith(b"\n") or len(piece) == LONGEST
    if begun:
        yield b"".join(begun), False


def _assign(line: Line, runs: list[Run]) -> None:
    fits = [run for run in runs if run.goes_on_with(line) and not _silent(run, line, runs)]
    if fits:
        max(fits, key=lambda run: run.last.token).add(line)
    else:
        runs.append(Run(line))


def _silent(run: Run, line: Line, runs: list[Run]) -> bool:
    """Whether others have written since, and this one has not for long."""
    others = any(other.last.timestamp > run.last.timestamp for other in runs if other is not run)
    return others and (line.timestamp - run.last.timestamp).total_seconds() > SILENT_S
