"""The cache folder: what superllama keeps on disk and can fetch or make again.

upstream/<build>   the pristine llama.cpp that a build starts from (cmake/upstream.py uses the same folder)
page/<build>       the server's page, built from it with npm (cmake/page.py)
models/<file>       models that were downloaded by default
repacked/<file>     blocks of weights in the layout of the CPU's fast kernels, one file for each model that streams
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

KINDS = ("upstream", "page", "models", "repacked")


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
    """The folder: $SUPERLLAMA_CACHE, or `superllama` in the user's cache folder. It need not exist."""
    if configured := os.environ.get("SUPERLLAMA_CACHE"):
        return Path(configured)
    import platformdirs

    return Path(platformdirs.user_cache_dir("superllama", appauthor=False))


def entries() -> list[Entry]:
    """What is there, leftovers of interrupted downloads included."""
    found = []
    for kind in KINDS:
        folder = cache_dir() / kind
        if folder.is_dir():
            found += [Entry(kind, path, size_of(path), _used(path)) for path in sorted(folder.iterdir())]
    return found


def prune(
    names: Sequence[str] = (), *, older_than_days: float | None = None, max_bytes: int | None = None
) -> list[Entry]:
    """Remove the entries of these names ("models/x.gguf", "models"), or all; return what was removed.

    Of them, `older_than_days` spares what was used since, and `max_bytes` the last used that fit into so much.

    Raises: KeyError for a name that is not there (nothing is removed then), OSError if one cannot be removed.
    """
    all_entries = entries()
    unknown = [name for name in names if name not in KINDS and not any(name == e.name for e in all_entries)]
    if unknown:
        raise KeyError(unknown[0])
    chosen = [e for e in all_entries if not names or e.name in names or e.kind in names]
    if older_than_days is not None:
        chosen = [e for e in chosen if e.used < time.time() - older_than_days * 86400]
    if max_bytes is not None:
        kept = 0
        for entry in sorted(chosen, key=lambda e: e.used, reverse=True):
            if kept + entry.size_bytes <= max_bytes:
                kept += entry.size_bytes
                chosen.remove(entry)
    for entry in chosen:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
    return chosen


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def _used(path: Path) -> float:
    stat = path.lstat()
    return max(stat.st_atime, stat.st_mtime)
