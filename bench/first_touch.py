"""The first touch of memory, out of the time that is measured.

A virtual machine may have given free memory back to its host. Whoever touches it next waits until the host gives it
again: half a second to two for a gigabyte, in which the processor does nothing else. That says nothing of an engine.
"""

from __future__ import annotations

import mmap

import psutil


def touch(n_bytes: int) -> None:
    """Take so much memory, or nearly all that is available, write to every page, and free it for who comes next."""
    n_bytes = min(n_bytes, psutil.virtual_memory().available * 9 // 10)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    mmap.mmap(-1, n_bytes, flags=flags).close()
