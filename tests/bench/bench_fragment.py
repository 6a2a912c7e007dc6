"""Make a file whose blocks lie in many pieces on the disk, forwards and backwards, on purpose."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CHUNK = 256 << 10
COLLAPSE, INSERT = 0x08, 0x20


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, mode, offset, size) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def fragmented(path: Path, chunks: int = 24) -> Path:
    """Every second chunk is cut out (jumps forward), then new ones are put between (jumps there and back).

    Raises OSError where the filesystem can do neither (ext4 and xfs can).
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for _ in range(2 * chunks + 1):  # a cut may not reach the end
            os.write(fd, os.urandom(CHUNK))
        os.fsync(fd)
        for i in range(chunks):
            _fallocate(fd, COLLAPSE, (i + 1) * CHUNK, CHUNK)
        for i in range(chunks - 4, 0, -8):
            # larger than the holes that the cuts left: the filesystem must put it elsewhere
            _fallocate(fd, INSERT, i * CHUNK, 4 * CHUNK)
            os.pwrite(fd, os.urandom(4 * CHUNK), i * CHUNK)
            os.fsync(fd)
    finally:
        os.close(fd)
    return path
