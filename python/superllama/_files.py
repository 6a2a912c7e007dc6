"""Paths that users name: a file that can be read from its beginning again, or an error at once.

Opening a FIFO waits for its other end, a device may have no end, and over either a library that maps files or reads
them twice fails in ways that say nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO or a pipe (a shell's <(...) is one)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

Kind = Callable[[str], Exception]


def open_regular(path: str | os.PathLike[str] | bytes, error: Kind) -> BinaryIO:
    """The file, open for reading. Raises: `error` if it is none, without waiting; OSError if it cannot be opened."""
    _check_type(path, error)
    check_mode(path, os.stat(path).st_mode, error)  # noqa: PTH116 - a socket cannot even be opened
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - its own close() may come twice
    try:
        check_mode(path, os.fstat(file.fileno()).st_mode, error)
    except BaseException:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def replaceable(path: str | os.PathLike[str], error: Kind) -> Path:
    """The path of the file that is written when this one is: behind links, and a file or nothing yet.

    Raises: `error` if it is something that a file must not take the place of.
    """
    _check_type(path, error)
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.exists():
        check_mode(path, target.stat().st_mode, error)
    return target


def model_bytes(file: Path) -> int:
    """Bytes of a model's file, or of all parts of a split one that are there; links are followed."""
    first, _, rest = file.name.partition("-00001-of-")
    parts = file.parent.glob(f"{first}-*-of-{rest}") if rest else [file]
    return sum(part.stat().st_size for part in parts)


def open_files_hint(*why: str) -> str:
    """What to add to an error where the system's limit of open files is the reason, and not named; else ""."""
    if not any(os.strerror(errno.EMFILE) in line for line in why) or any("ulimit -n" in line for line in why):
        return ""
    limit = ""
    with contextlib.suppress(ImportError):  # Windows has no such limit to ask for
        import resource

        limit = f"; the limit of this process is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open files"
    return f"{limit}; raise it with ulimit -n, or close files that are not needed"


def check_mode(path: object, mode: int, error: Kind) -> None:
    """Raises: `error` if this is the mode of something else than a file."""
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise error(f"{os.fsdecode(path)} is {what}, and a regular file is needed")  # type: ignore[arg-type]


def _check_type(path: object, error: Kind) -> None:
    if isinstance(path, int) or not isinstance(path, str | bytes | os.PathLike):  # a number would be a descriptor
        raise error(f"a path is expected, not {path!r:.60}")
