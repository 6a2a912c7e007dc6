"""Write a GGUF whose tensors are made while they are written, so that a model of any size needs little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHUNK_BYTES = 16 << 20
Q4_0_BLOCK = 32  # weights per block
Q4_0_BYTES = 18  # a half-precision scale and 16 bytes of nibbles

Chunks = Iterator[np.ndarray]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # rows last, as numpy: (..., n_in)
    type: gguf.GGMLQuantizationType
    make: Callable[[np.random.Generator], Chunks]

    @property
    def n_bytes(self) -> int:
        block, n_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * n_bytes


def exact(name: str, values: np.ndarray) -> Tensor:
    """A small tensor of given values: float32, or Q4_0 through the reference quantiser."""
    values = np.ascontiguousarray(values, np.float32)
    return Tensor(name, values.shape, gguf.GGMLQuantizationType.F32, lambda _: iter([values]))


def exact_q4_0(name: str, values: Callable[[], np.ndarray], shape: tuple[int, ...]) -> Tensor:
    def make(_: np.random.Generator) -> Chunks:
        yield gguf.quants.quantize(np.ascontiguousarray(values(), np.float32), gguf.GGMLQuantizationType.Q4_0)

    return Tensor(name, shape, gguf.GGMLQuantizationType.Q4_0, make)


# nibbles are uniform over -8..7: their standard deviation in units of the block's scale
NIBBLE_STD = float(np.sqrt(np.mean((np.arange(16) - 8.0) ** 2)))


def random_q4_0(name: str, shape: tuple[int, ...], std: float, row_mask: np.ndarray | None = None) -> Tensor:
    """Random Q4_0 blocks whose weights have the given standard deviation; rows where row_mask is False are zero.

    The scale's sign is random: nibbles average -0.5, and one sign for all would push every output the same way.
    """
    n_in = shape[-1]
    if n_in % Q4_0_BLOCK:
        raise ValueError(f"{name}: rows of {n_in} weights; Q4_0 needs a multiple of {Q4_0_BLOCK}")
    blocks_per_row = n_in // Q4_0_BLOCK
    n_rows = int(np.prod(shape[:-1]))
    scale = np.float16(std / NIBBLE_STD).view(np.uint16)

    def make(rng: np.random.Generator) -> Chunks:
        step = max(1, CHUNK_BYTES // (blocks_per_row * Q4_0_BYTES))
        for first in range(0, n_rows, step):
            rows = min(step, n_rows - first)
            raw = np.frombuffer(rng.bytes(rows * blocks_per_row * Q4_0_BYTES), np.uint8)
            words = raw.reshape(rows, blocks_per_row, Q4_0_BYTES).copy().view(np.uint16)
            words[:, :, 0] = scale | (words[:, :, 0] & 0x8000)
            if row_mask is not None:
                words[~row_mask[(first + np.arange(rows)) % len(row_mask)], :, 0] = 0
            yield words

    return Tensor(name, shape, gguf.GGMLQuantizationType.Q4_0, make)


def copy_keys(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, prefix: str, changed: dict[str, Any]) -> None:
    """Copy the keys that begin so, some with other values."""
    add: dict[type, Callable[[str, Any], None]] = {
        list: writer.add_array,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, field in reader.fields.items():
        if key.startswith(prefix):
            value = changed.get(key, field.contents())
            add[type(value)](key, value)


def copy_vocabulary(writer: gguf.GGUFWriter, source: Path) -> int:
    """Copy the tokenizer's keys of another GGUF; returns the number of tokens."""
    reader = gguf.GGUFReader(source)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    if tokens is None or not tokens.data:
        raise ValueError(f"{source} has no tokenizer.ggml.tokens; give a GGUF model with a vocabulary")
    copy_keys(writer, reader, "tokenizer.", {})
    return len(tokens.data)


def write(writer: gguf.GGUFWriter, tensors: list[Tensor], path: Path, seed: int) -> None:
    """Header, then every tensor in turn. Each tensor has its own random stream: the file depends on the seed alone."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type)
    partial = path.with_name(path.name + ".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    try:
        with partial.open("ab") as out:
            align = writer.data_alignment
            out.write(b"\0" * (-out.tell() % align))
            for index, tensor in enumerate(tensors):
                rng = np.random.Generator(np.random.SFC64([seed, index]))
                written = sum(out.write(np.ascontiguousarray(chunk).data.cast("B")) for chunk in tensor.make(rng))
                if written != tensor.n_bytes:
                    raise AssertionError(f"{tensor.name}: {written} bytes made, {tensor.n_bytes} announced")
                out.write(b"\0" * (-written % align))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
