"""The cache folder: what superllama keeps on disk and can fetch or make again.

upstream/<build>   the pristine llama.cpp that a build starts from (cmake/upstream.py uses the same folder)
page/<build>       the server's page, built from it with npm (cmake/page.py)
models/<file>       models that were downloaded by default
repacked/<file>     blocks of weights in the layout of the CPU's fast kernels, one file for each model that streams
rpc-weights/<file>  where weights are in a model file of an RPC server, by their hashes
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

KINDS = ("upstream", "page", "models", "repacked", "rpc-weights")
WRITING = re.compile(r"\.writing$|\.blocks\.\d+$")  # names of repacked files on their way, now and in earlier versions
QUIET_S = 3600


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing in the cache: `kind` is its folder, `size_bytes` counts all files below `path`, `used` is when it
    was written or last read, in seconds since 1970."""

    kind: str
    path: Path
    size_bytes: int
    used: float

    @property
    def name(self) -> str:
        """What `superllama cache prune` calls it."""
        return f"{self.kind}/{self.path.name}"


def cache_dir() -> Path:
    """The folder: the first of `cache_dirs()` that can be written. It need not exist."""
    places = cache_dirs()
    return next((place for place in places if _can_be_written(place)), places[0])


def cache_dirs() -> list[Path]:
    """Where files may be, in the order in which folders are tried; src/io/cache_folder.h has the same rules.

    $SUPERLLAMA_CACHE alone, with ~ for the home folder; else `superllama` in the user's cache folder ($XDG_CACHE_HOME,
    or .cache in the home folder), then a folder of this user's in the temporary one. A variable that has to name a
    whole path and does not is ignored: the working directory is nobody's cache.
    """
    configured = os.environ.get("SUPERLLAMA_CACHE", "")
    if os.name == "nt":
        import platformdirs

        return [Path(configured or platformdirs.user_cache_dir("superllama", appauthor=False))]
    home = _home()
    if configured == "~" or configured.startswith("~/"):
        configured = f"{home}{configured[1:]}" if home else ""
    if configured:
        return [Path(configured)]
    places = []
    own = os.environ.get("XDG_CACHE_HOME", "") if sys.platform != "darwin" else ""
    if own.startswith("/"):
        places.append(Path(own) / "superllama")
    elif home:
        places.append(Path(home) / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "superllama")
    temporary = os.environ.get("TMPDIR", "")
    temporary = temporary if temporary.startswith("/") else "/tmp"
    return [*places, Path(temporary) / f"superllama-{os.geteuid()}"]


def _home() -> str:
    """As the environment has it, else as the system's list of users does; "" where neither knows a whole path."""
    if (home := os.environ.get("HOME", "")).startswith("/"):
        return home
    import pwd

    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ""
    return home if home.startswith("/") else ""


def _can_be_written(folder: Path) -> bool:
    """Whether it can be, or be made. A folder that belongs to somebody else is not written, whatever its mode."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    mine = existing != folder or os.name == "nt" or existing.stat().st_uid in (0, os.geteuid())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK) and mine


def entries() -> list[Entry]:
    """What is there, leftovers of interrupted downloads included; those of killed writers of repacked files go."""
    found = []
    for place in cache_dirs():
        remove_leftovers(place / "repacked")
        for kind in KINDS:
            folder = place / kind
            if folder.is_dir():
                found += [Entry(kind, path, size_of(path), _used(path)) for path in _files(folder)]
    return found


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not WRITING.search(path.name))
    except PermissionError:
        return []  # somebody else's


def remove_leftovers(folder: Path) -> None:
    """Remove what writers of repacked files left that were killed, by the rules of src/io/cache_file.cpp.

    A writer that lives has a lock on its file. A lock that can be had tells nothing on network filesystems, and of
    files of earlier versions: those are removed when nothing was written to them for an hour.
    """
    if sys.platform != "linux" or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
        return
    for path in [p for p in folder.iterdir() if WRITING.search(p.name)]:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                locked = _lock(fd)
                quiet = time.time() - os.fstat(fd).st_mtime > QUIET_S
                tells = locked and path.name.endswith(".writing") and _locks_are_shared(folder)
                if locked is not False and (tells or quiet):
                    path.unlink()
            finally:
                os.close(fd)


def _lock(fd: int) -> bool | None:
    """Whether the file could be locked; None where there are no locks."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _locks_are_shared(folder: Path) -> bool:
    """Whether a lock that is taken on one machine is seen by all that see the file."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [m for m in mounts if folder.resolve().is_relative_to(m[1].replace("\\040", " "))]
    kind = max(above, key=lambda m: len(m[1]))[2] if above else ""
    return not kind.startswith(("nfs", "cifs", "smb", "9p", "fuse", "virtiofs", "ceph", "lustre", "gpfs"))


def chosen(
    names: Sequence[str] = (), *, older_than_days: float | None = None, max_bytes: int | None = None
) -> list[Entry]:
    """The entries of these names ("models/x.gguf", "models"), or all.

    Of them, `older_than_days` spares what was used since, and `max_bytes` the last used that fit into so much.

    Raises: KeyError for a name that is not there.
    """
    all_entries = entries()
    unknown = [name for name in names if name not in KINDS and not any(name == e.name for e in all_entries)]
    if unknown:
        raise KeyError(unknown[0])
    found = [e for e in all_entries if not names or e.name in names or e.kind in names]
    if older_than_days is not None:
        found = [e for e in found if e.used < time.time() - older_than_days * 86400]
    if max_bytes is not None:
        kept = 0
        for entry in sorted(found, key=lambda e: e.used, reverse=True):
            if kept + entry.size_bytes <= max_bytes:
                kept += entry.size_bytes
                found.remove(entry)
    return found


def remove(found: Sequence[Entry]) -> None:
    """Remove entries. Raises: OSError if one cannot be removed; one that is gone already is fine."""
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def _used(path: Path) -> float:
    stat = path.lstat()
    return max(stat.st_atime, stat.st_mtime)
