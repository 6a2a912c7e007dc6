"""The cache folder: what superllama keeps on disk and can fetch or make again.

upstream/<commit>   the pristine llama.cpp that a build starts from (cmake/upstream.py uses the same folder)
models/<file>       models that were downloaded by default
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

KINDS = ("upstream", "models")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing in the cache: `kind` is its folder, `size_bytes` counts all files below `path`."""

    kind: str
    path: Path
    size_bytes: int

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
            found += [Entry(kind, path, size_of(path)) for path in sorted(folder.iterdir())]
    return found


def prune(names: Sequence[str] = ()) -> list[Entry]:
    """Remove the entries of these names ("models/x.gguf", "models"), or all; return what was removed.

    Raises: KeyError for a name that is not there (nothing is removed then), OSError if one cannot be removed.
    """
    all_entries = entries()
    unknown = [name for name in names if not any(name in (e.name, e.kind) for e in all_entries)]
    if unknown:
        raise KeyError(unknown[0])
    chosen = [e for e in all_entries if not names or e.name in names or e.kind in names]
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
