"""How fast can it be? The limits that a result is measured against.

Dense: every token needs all weights but the token embedding (of which one row is read), in the same order. With M
bytes resident the rest comes from the disk: at most min(compute, B / (S - M)) tokens/s. S counts the bytes that a token
needs, not the file's size; that makes the bound higher, and harder to reach. M is the whole budget, though the KV
cache, compute buffers and the ring lie in it too.

MoE: what must be read depends on the routing; the floor of the time is missed experts x bytes of one / B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from bench.trace.tensors import TensorMap, read_map

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


@dataclass(frozen=True)
class Weights:
    """What a token needs of a model's file. `expert_bytes` and what is said of experts is 0 for a dense model."""

    file_bytes: int
    n_layer: int
    needed_bytes: int  # of a prompt, which needs all; a token needs of the experts only those that it is sent to
    expert_bytes: int = 0  # of one, in one layer
    n_experts: int = 0  # over all layers
    n_used: int = 0  # of them by a token

    @property
    def moe(self) -> bool:
        return self.expert_bytes > 0

    @property
    def token_bytes(self) -> int:
        return self.needed_bytes - (self.n_experts - self.n_used) * self.expert_bytes

    @property
    def dense_bytes(self) -> int:
        """What every token needs."""
        return self.needed_bytes - self.n_experts * self.expert_bytes

    def host_bytes(self, vram: float) -> float:
        """Of a prompt's weights, those that a card with this budget lacks."""
        return max(0, self.needed_bytes - vram)

    def missing(self, vram: float) -> float:
        """The same of a token's. The card has what every token needs first, then experts, which are asked for alike
        as far as this knows; where a run has counted what was missing, that is nearer the truth."""
        if not self.moe or vram < self.dense_bytes:
            return max(0, self.token_bytes - vram)
        absent = max(0, 1 - (vram - self.dense_bytes) / (self.n_experts * self.expert_bytes))
        return absent * self.n_used * self.expert_bytes


@dataclass(frozen=True)
class CardLimits:
    """What a card, its link, memory and disk give together; speeds in bytes/s."""

    token_s: float  # of a token with everything on the card; 0 where the card does not hold it
    prompt_s: Mapping[int, float]  # of a prompt of that many tokens, the same
    n_ubatch: int
    card_bytes: float  # of its memory, whatever a budget allows
    ram: float
    link: float
    disk: float

    def decode(self, weights: Weights, missing: float, from_disk: float = 0.0) -> float | None:
        """Tokens/s, where a token lacks so many bytes on the card, and of them so many in memory. The share that goes
        over the link is the best one: both parts take the same time. None: nothing that is known bounds it."""
        on_card_s = self.token_s * (1 - missing / weights.token_bytes)
        seconds = max(on_card_s, missing / (self.ram + self.link), from_disk / self.disk)
        return 1 / seconds if seconds > 0 else None

    def prompt(self, n: int, host_bytes: float, from_disk: float = 0.0) -> float | None:
        """The same of a prompt of n tokens, each ubatch of which needs so many bytes that the card lacks."""
        ubatches = math.ceil(n / self.n_ubatch)
        seconds = max(self.prompt_s.get(n, 0), ubatches * host_bytes / self.link, ubatches * from_disk / self.disk)
        return n / seconds if seconds > 0 else None


def weights_of(path: Path) -> Weights:
    where = read_map(path)
    one = expert_bytes(where)
    if not one:
        return Weights(where.file_bytes, where.n_layer, needed_bytes(where))
    fields = gguf.GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    used, experts = (int(fields[f"{architecture}.expert_{name}"].contents()) for name in ("used_count", "count"))
    layers = len({int(layer) for layer, expert in zip(where.layers, where.experts, strict=True) if expert >= 0})
    return Weights(where.file_bytes, where.n_layer, needed_bytes(where), one, layers * experts, layers * used)
