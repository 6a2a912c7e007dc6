"""The best static placement of stock llama.cpp that takes no more of a card than a given number of bytes.

Dense models: the largest -ngl. Mixture of experts: attention of all layers there, and experts of as many layers as fit
(-ncmoe), or a cache of experts (--moe-cache-mib), whichever decodes faster; where not even attention fits, the largest
-ngl with all experts on the host.

Nothing here runs a program: how much a placement takes is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # as llama.cpp's -cmoe names them
ALL = 99  # layers
MIB = 1 << 20
CACHE_TRIES = 3  # a cache takes more than it is told to


@dataclass(frozen=True)
class Placement:
    """Flags of stock. `n_cpu_moe`: experts of the first so many layers on the host, ALL of every one."""

    n_gpu_layers: int
    n_cpu_moe: int = 0
    cache_mib: int = 0

    def __str__(self) -> str:
        flags = f"-ngl {self.n_gpu_layers}"
        if self.n_cpu_moe:
            flags += " -cmoe" if self.n_cpu_moe == ALL else f" -ncmoe {self.n_cpu_moe}"
        return f"{flags} --moe-cache-mib {self.cache_mib}" if self.cache_mib else flags

    def model_params(self) -> dict[str, object]:
        """The same for superllama.Model."""
        layers = [EXPERTS] if self.n_cpu_moe == ALL else [rf"blk\.{i}{EXPERTS}" for i in range(self.n_cpu_moe)]
        return {"n_gpu_layers": self.n_gpu_layers, "override_tensor": dict.fromkeys(layers, "CPU")}

    def context_params(self) -> dict[str, object]:
        return {"moe_cache_size": self.cache_mib * MIB}


Peak = Callable[[Placement], "int | None"]  # bytes of the card that it takes at most; None: more than there are
Speed = Callable[[Placement], float]  # tokens/s


def most(peak: Callable[[int], int | None], limit: int, n_max: int) -> int | None:
    """The largest n up to n_max whose peak is not above the limit; None where that of 0 is. Peaks grow with n, nearly
    along a line: the first guesses follow it, the later ones halve what is left, so that few are asked for."""
    least = peak(0)
    if least is None or least > limit:
        return None
    highest = peak(n_max)
    if highest is not None and highest <= limit:
        return n_max
    low, high, at_low, at_high = 0, n_max, least, highest
    for i in range(n_max):
        if high - low <= 1:
            break
        n = (low + high) // 2
        if at_high is not None and i < 4:
            along = low + math.floor((high - low) * (limit - at_low) / max(1, at_high - at_low))
            n = min(max(along, low + 1), high - 1)
        here = peak(n)
        if here is not None and here <= limit:
            low, at_low = n, here
        else:
            high, at_high = n, here
    return low


def best(peak: Peak, speed: Speed, limit: int, n_layer: int, moe: bool) -> Placement | None:
    """None: stock takes more than that even with no layer on the card."""
    if not moe:
        found = most(lambda n: peak(Placement(n)), limit, n_layer + 1)  # and the output
        return None if found is None else Placement(found)
    with_experts = most(lambda n: peak(_experts_of(n, n_layer)), limit, n_layer)
    if with_experts is None:
        found = most(lambda n: peak(Placement(n, ALL)), limit, n_layer + 1)
        return None if found is None else Placement(found, ALL)
    layers = _experts_of(with_experts, n_layer)
    if layers.n_cpu_moe == 0:  # everything is there
        return layers
    cache = _largest_cache(peak, limit)
    return max((layers, cache), key=speed) if cache else layers


def _experts_of(n: int, n_layer: int) -> Placement:
    """Experts of so many layers on the card."""
    return Placement(ALL, n_layer - n if n else ALL)


def _largest_cache(peak: Peak, limit: int) -> Placement | None:
    without = peak(Placement(ALL, ALL))
    assert without is not None  # the experts of no layer were found to fit
    mib = (limit - without) // MIB
    for _ in range(CACHE_TRIES):
        if mib <= 0:
            return None
        takes = peak(Placement(ALL, ALL, mib))
        if takes is not None and takes <= limit:
            return Placement(ALL, ALL, mib)
        mib -= max(1, mib // 8 if takes is None else math.ceil((takes - limit) / MIB))
    return None
