"""The page cache of one file: throw it out, and see which parts are in it (mincore, cachestat)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_SYS_CACHESTAT = 451  # the same on every architecture; Linux 6.5


def evict(path: Path) -> None:
    """Drop the file from the page cache: needs no root. Written data is synced first, as dirty pages stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def drop_all() -> bool:
    """Drop the whole machine's clean page cache; False without root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


class Residency:
    """Samples of which pages of a file are cached. Sampling maps the file but touches no page of it."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self.n_pages = -(-self.size // PAGE)
        self._fd = os.open(path, os.O_RDONLY)
        self._at = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, self._fd, 0)
        if self._at == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {path}")

    def pages(self) -> np.ndarray:
        """One bool per page."""
        out = np.zeros(self.n_pages, np.uint8)
        if _libc.mincore(self._at, self.size, out.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return (out & 1).astype(bool)

    def cached_bytes(self, offset: int = 0, n_bytes: int | None = None) -> int | None:
        """By cachestat(2), cheaper than mincore; None before Linux 6.5."""
        wanted = _Range(offset, self.size - offset if n_bytes is None else n_bytes)
        stat = _Stat()
        if _libc.syscall(_SYS_CACHESTAT, self._fd, ctypes.byref(wanted), ctypes.byref(stat), 0) != 0:
            return None
        return int(stat.cached) * PAGE

    def close(self) -> None:
        _libc.munmap(self._at, self.size)
        os.close(self._fd)

    def __enter__(self) -> Residency:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
