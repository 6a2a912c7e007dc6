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


def device_sizes(value: object) -> list[int]:
    """Bytes for each device that there can be, of one size for all, or of sizes of which the last holds for the rest;
    0 for "auto", 1 for 0.

    Raises: ValueError, with what is allowed.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    text = ",".join(map(str, values))
    if not values or any(isinstance(v, bool) or not isinstance(v, int | str) for v in values) or "\0" in text:
        raise ValueError(f"{value!r} is no size, nor a list of sizes")
    params = ffi.new("struct superllama_model_params *")  # has to stay: its array belongs to it
    if lib.superllama_vram_budget(text.encode(), params.vram_budget_bytes) < 0:
        raise ValueError(last_error())
    return list(params.vram_budget_bytes)
