"""The disk under a file: its name, its queue's read-ahead, its counters."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    name: str  # "vda": the whole disk
    number: str  # "254:0": the device the filesystem lies on, may be a partition
    sys: Path  # /sys/... of the whole disk
    start: int  # first sector (512 bytes) of the partition on the disk, 0 without one

    @property
    def read_ahead(self) -> Path:
        return self.sys / "queue/read_ahead_kb"

    @property
    def disk_number(self) -> str:
        return (self.sys / "dev").read_text().strip()

    def read_ahead_kb(self) -> int:
        return int(self.read_ahead.read_text())

    def bytes_read(self) -> int:
        """By everyone, since the machine started."""
        return int((self.sys / "stat").read_text().split()[2]) * 512


def disk_of(path: Path) -> Disk | None:
    """None where the filesystem has no block device of its own (overlay, tmpfs, network)."""
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    sys = Path("/sys/dev/block") / name
    if not sys.exists():
        return None
    sys = sys.resolve()
    start = 0
    if (sys / "partition").exists():
        start = int((sys / "start").read_text())
        sys = sys.parent
    return Disk(sys.name, name, sys, start)
