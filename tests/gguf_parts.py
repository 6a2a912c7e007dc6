"""A GGUF file in parts that can be changed one by one, and written again whatever they say."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
INTEGERS = (U8, I8, U16, I16, U32, I32, U64, I64)

# numbers in a block and bytes of it, by type of tensor; what is missing was removed from the format
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (128, 34),
}  # fmt: skip
N_TYPES = 43


@dataclasses.dataclass
class Value:
    """One entry of the metadata; `element` is the type of an array's elements, and then `value` is a list."""

    key: bytes
    type: int
    value: Any
    element: int | None = None
    count: int | None = None  # of elements, as the file says it; None is the truth

    def copy(self) -> Value:
        return dataclasses.replace(self, value=list(self.value) if isinstance(self.value, list) else self.value)


@dataclasses.dataclass
class Tensor:
    name: bytes
    shape: list[int]
    type: int
    data: bytes
    offset: int | None = None  # as the file says it; None is the truth
    n_dims: int | None = None

    def copy(self) -> Tensor:
        return dataclasses.replace(self, shape=list(self.shape))

    def n_bytes(self) -> int | None:
        """Of data of this shape and type, None if there is no such size."""
        if self.type not in BLOCKS:
            return None
        block, size = BLOCKS[self.type]
        n = 1
        for extent in self.shape:
            n *= extent
        return n // block * size

    def fit(self, limit: int = 64 << 20) -> None:
        """Make the data as long as shape and type say, repeating what there is."""
        n = self.n_bytes()
        if n is None or n > limit or n < 0:
            return
        data = self.data or b"\0"
        self.data = (data * (n // len(data) + 1))[:n]


@dataclasses.dataclass
class Parts:
    """All of a file. Written with the numbers that `version`, `n_values`, ... say, where they are not None."""

    values: list[Value]
    tensors: list[Tensor]
    version: int = 3
    n_values: int | None = None
    n_tensors: int | None = None

    def copy(self) -> Parts:
        values, tensors = [v.copy() for v in self.values], [t.copy() for t in self.tensors]
        return dataclasses.replace(self, values=values, tensors=tensors)

    def find(self, key: str) -> Value | None:
        return next((v for v in self.values if v.key == key.encode()), None)

    def set(self, key: str, type: int, value: Any, element: int | None = None) -> None:
        self.values = [v for v in self.values if v.key != key.encode()]
        self.values.append(Value(key.encode(), type, value, element))

    @property
    def architecture(self) -> str:
        value = self.find("general.architecture")
        return value.value.decode("utf-8", "replace") if value and isinstance(value.value, bytes) else ""


# ---------------------------------------------------------------- reading


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def unpack(self, format: str) -> Any:
        (value,) = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return value

    def text(self) -> bytes:
        n = self.unpack("Q")
        self.at += n
        return self.data[self.at - n : self.at]

    def value(self, type: int) -> Any:
        return self.text() if type == STRING else self.unpack(FORMATS[type])


def read(path: Path) -> Parts:
    r = _Reader(path.read_bytes())
    r.at = 4
    version, n_tensors, n_values = r.unpack("I"), r.unpack("Q"), r.unpack("Q")
    values = []
    for _ in range(n_values):
        key, type = r.text(), r.unpack("I")
        if type == ARRAY:
            element, count = r.unpack("I"), r.unpack("Q")
            values.append(Value(key, type, [r.value(element) for _ in range(count)], element))
        else:
            values.append(Value(key, type, r.value(type)))
    tensors = []
    for _ in range(n_tensors):
        name = r.text()
        shape = [r.unpack("Q") for _ in range(r.unpack("I"))]
        tensors.append((Tensor(name, shape, r.unpack("I"), b""), r.unpack("Q")))
    parts = Parts(values, [t for t, _ in tensors], version)
    alignment = parts.find("general.alignment")
    start = padded(r.at, alignment.value if alignment else 32)
    for tensor, offset in tensors:
        tensor.data = r.data[start + offset : start + offset + (tensor.n_bytes() or 0)]
    return parts


def padded(n: int, alignment: int) -> int:
    return n if alignment <= 0 else (n + alignment - 1) // alignment * alignment


# ---------------------------------------------------------------- writing


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _scalar(type: int, value: Any) -> bytes:
    if type == STRING:
        return _text(value)
    format = FORMATS.get(type, "I")
    if format in "fd":
        try:
            return struct.pack("<" + format, value)
        except OverflowError:  # of a double for a float
            return struct.pack("<" + format, math.copysign(math.inf, value))
    size = struct.calcsize(format)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _value(v: Value) -> bytes:
    out = _text(v.key) + struct.pack("<I", v.type)
    if v.type != ARRAY:
        return out + _scalar(v.type, v.value)
    element = v.element if v.element is not None else U32
    out += struct.pack("<IQ", element, len(v.value) if v.count is None else v.count)
    return out + b"".join(_scalar(element, x) for x in v.value)


def write(parts: Parts) -> bytes:
    n_tensors = len(parts.tensors) if parts.n_tensors is None else parts.n_tensors
    n_values = len(parts.values) if parts.n_values is None else parts.n_values
    head = b"GGUF" + struct.pack("<IQQ", parts.version, n_tensors & (2**64 - 1), n_values & (2**64 - 1))
    pieces = [head, *map(_value, parts.values)]
    stated = parts.find("general.alignment")
    alignment = stated.value if stated and isinstance(stated.value, int) and 0 < stated.value < 1 << 16 else 32
    blobs, offset = [], 0
    for t in parts.tensors:
        shape = b"".join(struct.pack("<Q", extent & (2**64 - 1)) for extent in t.shape)
        n_dims = len(t.shape) if t.n_dims is None else t.n_dims
        at = offset if t.offset is None else t.offset
        pieces.append(_text(t.name) + struct.pack("<I", n_dims) + shape + struct.pack("<IQ", t.type, at & (2**64 - 1)))
        blobs.append(t.data + bytes(padded(len(t.data), alignment) - len(t.data)))
        offset += len(blobs[-1])
    head = b"".join(pieces)
    return b"".join([head, bytes(padded(len(head), alignment) - len(head)), *blobs])
