"""Where the layers of a model with dynamic layers are."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ._errors import ModelError
from ._native import ffi, last_error, lib

Tier = Literal["host", "disk"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, now. `tier` is "host" if all of it is in memory, "disk" if some of it is read when it is needed."""

    index: int
    tier: Tier
    bytes: int  # of its weights that can be streamed
    bytes_resident: int  # of them, in memory
    last_use: int  # number of the ubatch, 0 = never
    loads: int  # of its blocks
    evictions: int


def layers_of(model: Any) -> list[Layer]:
    """The layers of a native model, in order. Raises: ModelError if the library fails."""
    n = lib.superllama_layers(model, ffi.NULL, 0)
    entries = ffi.new("struct superllama_layer[]", max(n, 0))
    if n < 0 or lib.superllama_layers(model, entries, n) < 0:
        raise ModelError(f"the library cannot tell where the layers are: {last_error()}")
    return [
        Layer(
            index=e.index,
            tier="host" if e.tier == lib.SUPERLLAMA_TIER_HOST else "disk",
            bytes=e.bytes,
            bytes_resident=e.bytes_resident,
            last_use=e.last_use,
            loads=e.n_loads,
            evictions=e.n_evictions,
        )
        for e in entries
    ]
