"""Where the layers of a model with dynamic layers are, and what its memory is for."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ._errors import ModelError
from ._native import ffi, last_error, lib, text

Tier = Literal["host", "disk", "device"]

_TIERS: dict[int, Tier] = {
    lib.SUPERLLAMA_TIER_HOST: "host",
    lib.SUPERLLAMA_TIER_DISK: "disk",
    lib.SUPERLLAMA_TIER_DEVICE: "device",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, now. `tier` is "host" if all of it is in memory, "disk" if some of it is read when it is needed,
    "device" if it is in the memory of `device`. The last one is the output matrix, where it can be on a device or is
    not always in memory.
    """

    index: int  # from 0, as llama.cpp counts
    tier: Tier  # where it is now
    bytes: int  # of its weights that can be streamed
    bytes_resident: int  # of them, in memory
    last_use: int  # number of the ubatch, 0 = never
    loads: int  # of its blocks, so far
    evictions: int  # of its blocks
    device: str | None  # its name
    device_loads: int  # moves to a device
    device_evictions: int  # and back


def layers_of(model: Any) -> list[Layer]:
    """The layers of a native model, in order. Raises: ModelError if the library fails."""
    n = lib.superllama_layers(model, ffi.NULL, 0)
    entries = ffi.new("struct superllama_layer[]", max(n, 0))
    if n < 0 or lib.superllama_layers(model, entries, n) < 0:
        raise ModelError(f"the library cannot tell where the layers are: {last_error()}")
    return [
        Layer(
            index=e.index,
            tier=_TIERS[e.tier],
            bytes=e.bytes,
            bytes_resident=e.bytes_resident,
            last_use=e.last_use,
            loads=e.n_loads,
            evictions=e.n_evictions,
            device=text(e.device) if e.device else None,
            device_loads=e.n_device_loads,
            device_evictions=e.n_device_evictions,
        )
        for e in entries
    ]


def memory_by_tag(model: Any) -> dict[str, int]:
    """Bytes in memory now of a native model and its contexts, by what they are for. Raises: ModelError."""
    n = dict(ffi.typeof("struct superllama_stats").fields)["memory_by_tag"].type.length
    found = ffi.new("int64_t[]", n)
    if lib.superllama_memory_by_tag(model, found) < 0:
        raise ModelError(f"the library cannot tell what its memory is for: {last_error()}")
    return {text(lib.superllama_memory_tag(i)): found[i] for i in range(n)}
