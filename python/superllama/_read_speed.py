"""How fast a file can be read from its disk, in the way that the readers of the library read weights."""

from __future__ import annotations

import dataclasses
import io
import itertools
import mmap
import os
import threading
import time
from pathlib import Path

N_THREADS = 4
PART_BYTES = 4 << 20
HUGE_PAGE = 2 << 20


@dataclasses.dataclass(frozen=True)
class ReadSpeed:
    """What a measurement read; `how` is "O_DIRECT", "buffered, cache dropped", or "buffered", which may measure
    memory instead of the disk."""

    bytes: int
    seconds: float
    how: str

    @property
    def bytes_per_s(self) -> float:
        """The rate."""
        return self.bytes / max(self.seconds, 1e-9)


def measure_read(path: Path, *, max_bytes: int, max_seconds: float) -> ReadSpeed:
    """Read from the beginning of a file: several threads, each its next 4 MiB, until one of the limits.

    Raises: OSError if it cannot be read.
    """
    opened = [_open(path) for _ in range(N_THREADS)]
    offsets = itertools.count(0, PART_BYTES)  # next() on it is atomic
    n_read, errors = [0] * N_THREADS, []
    start = time.perf_counter()

    def read(thread: int, file: io.FileIO) -> None:
        buffer = _buffer()
        try:
            while (offset := next(offsets)) < max_bytes and time.perf_counter() - start < max_seconds:
                file.seek(offset)
                n = file.readinto(buffer) or 0
                n_read[thread] += n
                if n < PART_BYTES:
                    break  # the end of the file
        except OSError as e:
            errors.append(e)

    threads = [threading.Thread(target=read, args=(i, file)) for i, (file, _) in enumerate(opened)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for file, _ in opened:
        file.close()
    if errors:
        raise errors[0]
    return ReadSpeed(sum(n_read), seconds, opened[0][1])


def _buffer() -> memoryview:
    """Page-aligned, as O_DIRECT asks; in huge pages where the system has them, as a request then has few pieces."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, PART_BYTES))
    memory = mmap.mmap(-1, PART_BYTES + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:PART_BYTES]


def _open(path: Path) -> tuple[io.FileIO, str]:
    """Past the page cache where the system can."""
    if direct := getattr(os, "O_DIRECT", 0):
        try:
            file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | direct))
        except OSError:
            pass  # this file system has none
        else:
            try:
                file.readinto(mmap.mmap(-1, mmap.PAGESIZE))
                return file, "O_DIRECT"
            except OSError:
                file.close()
    file = io.FileIO(path)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file, "buffered, cache dropped"
    return file, "buffered"
