"""What lies where in a GGUF file: byte ranges with their tensor, layer and expert, for looking requests up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

NO_LAYER = -1  # token embedding, output, header
NO_EXPERT = -1
_EXPERTS = re.compile(r"_(exps|chexps)\.")


@dataclass(frozen=True)
class TensorMap:
    """Sorted, gapless ranges over the whole file; range i is [starts[i], starts[i + 1])."""

    starts: np.ndarray  # (n_ranges + 1) int64; the last is the file's size
    names: list[str]  # tensor name, "header" or "padding"
    layers: np.ndarray  # (n_ranges) int32
    experts: np.ndarray  # (n_ranges) int32

    @property
    def file_bytes(self) -> int:
        return int(self.starts[-1])

    @property
    def n_layer(self) -> int:
        return int(self.layers.max()) + 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def find(self, offsets: np.ndarray) -> np.ndarray:
        """Index of the range that holds each offset."""
        return np.clip(np.searchsorted(self.starts, offsets, side="right") - 1, 0, len(self.names) - 1)

    def split(self, offsets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut requests at range borders: (request index, range index, bytes) of each piece."""
        offsets, sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        ends = np.minimum(offsets + sizes, self.file_bytes)
        first, last = self.find(offsets), self.find(np.maximum(ends - 1, offsets))
        count = last - first + 1
        request = np.repeat(np.arange(len(offsets)), count)
        within = np.arange(len(request)) - np.repeat(np.cumsum(count) - count, count)
        index = first[request] + within
        low = np.maximum(self.starts[index], offsets[request])
        high = np.minimum(self.starts[index + 1], ends[request])
        return request, index, np.maximum(high - low, 0)

    def expert_ranges(self, layer: int, expert: int) -> list[tuple[int, int]]:
        """(offset, bytes) of the slices of one expert: gate, up and down."""
        found = np.flatnonzero((self.layers == layer) & (self.experts == expert))
        return [(int(self.starts[i]), int(self.starts[i + 1] - self.starts[i])) for i in found]


def read_map(path: Path) -> TensorMap:
    """The map of one GGUF file. Expert tensors (..., n_expert) are cut into one range per expert."""
    reader = gguf.GGUFReader(path)
    ranges: list[tuple[int, int, str, int, int]] = []
    for tensor in reader.tensors:
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        layer = int(match[1]) if match else NO_LAYER
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        n_expert = int(tensor.shape[2]) if len(tensor.shape) == 3 and _EXPERTS.search(tensor.name) else 1
        for e in range(n_expert):
            low, high = start + size * e // n_expert, start + size * (e + 1) // n_expert
            ranges.append((low, high, tensor.name, layer, e if n_expert > 1 else NO_EXPERT))
    return from_ranges(ranges, path.stat().st_size)


def from_ranges(ranges: list[tuple[int, int, str, int, int]], file_bytes: int) -> TensorMap:
    """From (start, end, name, layer, expert); what lies between becomes "header" or "padding"."""
    starts, names, layers, experts = [], [], [], []
    at = 0
    for low, high, name, layer, expert in [*sorted(ranges), (file_bytes, file_bytes, "", NO_LAYER, NO_EXPERT)]:
        if low > at:
            starts.append(at)
            names.append("padding" if at else "header")
            layers.append(NO_LAYER)
            experts.append(NO_EXPERT)
        if high > low:
            starts.append(low)
            names.append(name)
            layers.append(layer)
            experts.append(expert)
        at = max(at, high)
    return TensorMap(np.array([*starts, file_bytes], np.int64), names, np.array(layers, np.int32),
                     np.array(experts, np.int32))  # fmt: skip
