"""Sizes as people write them, read by the library's own parser."""

from __future__ import annotations

from ._native import ffi, last_error, lib


def size_bytes(value: int | str) -> int:
    """Bytes of "8GiB", "512MiB", "60%" of what this process may use, or a number of bytes; 0 for "auto".

    Raises: ValueError, with what is allowed.
    """
    text = str(value)
    if isinstance(value, bool) or "\0" in text:
        raise ValueError(f"{text!r} is not a size")
    out = ffi.new("uint64_t *")
    if lib.superllama_size(text.encode(), out) < 0:
        raise ValueError(last_error())
    return int(out[0])
