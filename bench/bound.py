"""How fast can it be? The limits that a result is measured against.

Dense: every token needs all weights but the token embedding (of which one row is read), in the same order. With M
bytes resident the rest comes from the disk: at most min(compute, B / (S - M)) tokens/s. S counts the bytes that a token
needs, not the file's size; that makes the bound higher, and harder to reach. M is the whole budget, though the KV
cache, compute buffers and the ring lie in it too.

MoE: what must be read depends on the routing; the floor of the time is missed experts x bytes of one / B.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.trace.tensors import TensorMap

NOT_STREAMED = ("header", "padding", "token_embd.weight")


@dataclass(frozen=True)
class Limits:
    needed_bytes: int  # S: bytes of the weights that a token of a dense model needs
    expert_bytes: int  # of one expert of one layer, 0 for a dense model
    bytes_per_s: float  # B
    compute: float  # tokens/s with everything in memory

    @property
    def moe(self) -> bool:
        return self.expert_bytes > 0

    def dense(self, budget: int) -> float:
        missing = self.needed_bytes - budget
        return self.compute if missing <= 0 else min(self.compute, self.bytes_per_s / missing)

    def experts(self, misses_per_token: float) -> float:
        missing = misses_per_token * self.expert_bytes
        return self.compute if missing <= 0 else min(self.compute, self.bytes_per_s / missing)


def needed_bytes(where: TensorMap) -> int:
    return int(sum(n for n, name in zip(where.sizes, where.names, strict=True) if name not in NOT_STREAMED))


def expert_bytes(where: TensorMap) -> int:
    if int(where.experts.max()) < 0:
        return 0
    layer = int(where.layers[where.experts >= 0][0])
    return sum(n for _, n in where.expert_ranges(layer, 0))
