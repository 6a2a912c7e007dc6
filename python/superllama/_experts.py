"""How often routers chose each expert of a model with dynamic layers, and where each is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ._errors import ModelError
from ._native import ffi, last_error, lib

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a model, since it was loaded; arrays have a row for each layer that has experts, in the order of
    `layers`, and a column for each expert. They are copies, and cannot be written to.

    What a layer chooses while all of it is on a device is not counted: the host does not see it. A warm-up, which
    computes with all experts, is left out. The last layer computes those tokens only whose output is asked for, of a
    prompt one.
    """

    layers: NDArray[np.int64]  # [n_layers]: which layer a row is of, as Layer.index
    uses: NDArray[np.int64]  # [n_layers, n_experts]: tokens that a router sent to it
    misses: NDArray[np.int64]  # [n_layers, n_experts]: ubatches that wanted it while it was not in memory
    loads: NDArray[np.int64]  # [n_layers, n_experts]: times that it was read, guesses included
    tier: NDArray[np.int64]  # [n_layers, n_experts]: 0 = in host memory, 1 = read when it is chosen, 2 = on a device

    def as_dict(self) -> dict[str, Any]:
        """As GET /superllama?experts=1 answers: `layers`, `uses`, `misses` and `tier` as lists."""
        return {name: getattr(self, name).tolist() for name in ("layers", "uses", "misses", "tier")}

    @property
    def resident(self) -> NDArray[np.bool_]:
        """[n_layers, n_experts]: whether it is in memory now, of the host or of a device."""
        found: NDArray[np.bool_] = self.tier != lib.SUPERLLAMA_TIER_DISK
        return found


def experts_of(model: Any) -> Experts:
    """The experts of a native model; of shape [0, 0] if it has none, or no dynamic layers. Raises: ModelError."""
    import numpy as np  # which an engine needs for nothing else

    n = lib.superllama_experts(model, ffi.NULL, 0)
    entries = ffi.new("struct superllama_expert[]", max(n, 0))
    if n < 0 or lib.superllama_experts(model, entries, n) < 0:
        raise ModelError(f"the library cannot tell where the experts are: {last_error()}")
    rows = {layer: i for i, layer in enumerate(sorted({e.layer for e in entries}))}
    shape = (len(rows), max((e.index + 1 for e in entries), default=0))
    found = {name: np.zeros(shape, np.int64) for name in ("uses", "misses", "loads", "tier")}
    for e in entries:
        at = rows[e.layer], e.index
        found["uses"][at], found["misses"][at], found["loads"][at], found["tier"][at] = (
            e.uses, e.misses, e.n_loads, e.tier
        )  # fmt: skip
    found["layers"] = np.array(list(rows), np.int64)
    for array in found.values():
        array.setflags(write=False)
    return Experts(**found)
