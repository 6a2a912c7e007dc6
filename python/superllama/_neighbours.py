"""Another llama.cpp in the same process: our libraries keep to themselves.

They have file names of their own and show no more than they must. What is left is a library that somebody loaded for
the whole process (RTLD_GLOBAL): the linker asks it first for llama_decode and the like. Where there is one, ours look
for names among themselves first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("llama_backend_init", "ggml_init", "ggml_backend_load_all_from_path")


def is_crowded() -> bool:
    """Whether names of ours are taken, before ours are loaded."""
    if not hasattr(os, "RTLD_DEEPBIND"):
        return False  # not glibc: other systems look up names by library
    process = ctypes.CDLL(None)
    return any(hasattr(process, name) for name in NAMES)


@contextlib.contextmanager
def apart() -> Iterator[bool]:
    """Import the binding in the with block; whether it had to be set apart."""
    crowded = is_crowded()
    flags = sys.getdlopenflags() if crowded else 0
    try:
        if crowded:
            sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
        yield crowded
    finally:
        if crowded:
            sys.setdlopenflags(flags)


def load_apart(folder: Path) -> None:
    """Load the backends that ggml will open itself, so that it gets them as they are."""
    for file in sorted(folder.glob("libggml-*.so")):
        with contextlib.suppress(OSError):  # one of another CPU or driver; ggml goes on without it as well
            ctypes.CDLL(str(file), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
