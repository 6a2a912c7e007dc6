"""Where a file's bytes lie on the disk (FIEMAP, as filefrag shows it), and the way back: disk offset to file offset."""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FS_IOC_FIEMAP = 0xC020660B
_FLAG_SYNC = 1  # write delayed allocations first, or they have no place yet
_HEADER = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")
_LAST = 0x1
_UNKNOWN = (
    0x2 | 0x4 | 0x8 | 0x100 | 0x200
)  # no location, delayed, encoded, inside metadata, tail: no address of its own


@dataclass(frozen=True)
class Extents:
    """Sorted by logical offset; bytes; neighbours in both spaces are merged, so len() is the number of jumps + 1."""

    logical: np.ndarray
    physical: np.ndarray  # on the whole disk
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.logical)

    def span(self) -> tuple[int, int]:
        """The disk's bytes from the file's first to its last."""
        return int(self.physical.min()), int((self.physical + self.length).max())

    def to_file(self, offsets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Requests on the disk to (request index, file offset, bytes); what is not of this file is left out."""
        offsets, sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        order = np.argsort(self.physical, kind="stable")
        start, length, logical = self.physical[order], self.length[order], self.logical[order]
        end = start + length
        first = np.searchsorted(end, offsets, side="right")  # first extent that ends behind the request's start
        last = np.searchsorted(start, offsets + sizes, side="left") - 1  # last that starts before its end
        count = np.maximum(last - first + 1, 0)
        request = np.repeat(np.arange(len(offsets)), count)
        extent = first[request] + np.arange(len(request)) - np.repeat(np.cumsum(count) - count, count)
        low = np.maximum(start[extent], offsets[request])
        high = np.minimum(end[extent], offsets[request] + sizes[request])
        return request, logical[extent] + low - start[extent], high - low

    def to_disk(self, offset: int) -> int:
        """Where one byte of the file lies; -1 in a hole."""
        i = int(np.searchsorted(self.logical, offset, side="right")) - 1
        if i < 0 or offset >= self.logical[i] + self.length[i]:
            return -1
        return int(self.physical[i] + offset - self.logical[i])


def from_list(extents: list[tuple[int, int, int]]) -> Extents:
    """From (logical, physical, length); merges what is contiguous in both."""
    merged: list[list[int]] = []
    for logical, physical, length in sorted(extents):
        last = merged[-1] if merged else None
        if last and last[0] + last[2] == logical and last[1] + last[2] == physical:
            last[2] += length
        else:
            merged.append([logical, physical, length])
    columns = np.array(merged, np.int64).reshape(-1, 3).T
    return Extents(*columns)


def read_extents(path: Path, start_sector: int = 0) -> Extents:
    """start_sector: of the partition on its disk. Raises OSError where the filesystem knows no FIEMAP."""
    found: list[tuple[int, int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            room = 512
            buffer = bytearray(_HEADER.pack(at, size - at, _FLAG_SYNC, 0, room, 0) + bytes(room * _EXTENT.size))
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
            n = _HEADER.unpack_from(buffer)[3]
            flags = 0
            for i in range(n):
                logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(
                    buffer, _HEADER.size + i * _EXTENT.size
                )
                at = logical + length
                if not flags & _UNKNOWN:
                    found.append((logical, physical + start_sector * 512, length))
            if n == 0 or flags & _LAST:
                break
    finally:
        os.close(fd)
    return from_list(found)
