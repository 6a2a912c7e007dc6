#!/usr/bin/env python3
"""Make a real dense model larger: the same answers, from a file of a wanted size.

bench/widen_model.py SmolLM2.gguf --size 1.6GB wide.gguf

The feed-forward layers get more neurons, copies of those they have, whose outputs weigh exactly nothing. Every weight
is read and computed for every token as in any dense model of that size, and the logits stay the small one's: for
questions that a random model cannot answer, such as how often its own text repeats.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.gguf_stream import CHUNK_BYTES, Chunks, Tensor, copy_keys, write
from bench.sizes import format_size, parse_size

WIDENED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight")
STEP = 256  # weights: whole blocks of every quantisation


def plan(tensors: list[gguf.ReaderTensor], n_ff: int, size: int) -> int:
    """Neurons of each layer so that the file has about this size."""
    all_bytes = sum(int(t.n_bytes) for t in tensors)
    ffn_bytes = sum(int(t.n_bytes) for t in tensors if WIDENED.fullmatch(t.name))
    wide = round((1 + (size - all_bytes) / ffn_bytes) * n_ff / STEP) * STEP
    if wide < n_ff:
        raise ValueError(f"--size {format_size(size)} is less than the model has: {format_size(all_bytes)}")
    return wide


def widened(tensor: gguf.ReaderTensor, n_ff: int) -> Tensor:
    """More rows of ffn_gate and ffn_up, more columns of ffn_down; other tensors as they are."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    data: np.ndarray = tensor.data
    if not (found := WIDENED.fullmatch(tensor.name)):
        return Tensor(tensor.name, shape, tensor.tensor_type, lambda _: iter([data]))
    n_rows, n_in = shape
    if found[1] == "down":  # zero bytes are zero weights, whatever the quantisation
        more = data.shape[1] * (n_ff - n_in) // n_in  # bytes, or numbers where it is not quantised
        return Tensor(tensor.name, (n_rows, n_ff), tensor.tensor_type, lambda _: (np.pad(r, (0, more)) for r in data))

    def tile(_: np.random.Generator) -> Chunks:
        step = max(1, CHUNK_BYTES // data[0].nbytes)
        for first in range(0, n_ff, step):
            yield data[np.arange(first, min(first + step, n_ff)) % n_rows]

    return Tensor(tensor.name, (n_ff, n_in), tensor.tensor_type, tile)


def widen(source: Path, path: Path, size: int) -> int:
    """Write the model; returns its neurons per layer."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    key = f"{arch}.feed_forward_length"
    n_ff = reader.fields[key].contents() if key in reader.fields else None
    if not isinstance(n_ff, int) or n_ff % STEP or not any(WIDENED.fullmatch(t.name) for t in reader.tensors):
        raise ValueError(f"{source} has no dense feed-forward layers, all of the same multiple of {STEP} neurons")
    wide = plan(reader.tensors, n_ff, size)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_name(f"{source.stem}, widened to {format_size(size)}")
    for prefix in ("general.file_type", "general.quantization_version", "tokenizer.", f"{arch}."):
        copy_keys(writer, reader, prefix, {key: wide})
    write(writer, [widened(t, wide) for t in reader.tensors], path, seed=0)
    return wide


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=parse_size, default=parse_size("1.6GB"), help="of the file: 1.6GB, 300MB")
    a = parser.parse_args()
    try:
        n_ff = widen(a.model, a.out, a.size)
    except ValueError as error:
        print(f"widen_model: {error}", file=sys.stderr)
        return 2
    print(f"{a.out}: {format_size(a.out.stat().st_size)}, {n_ff} neurons in each feed-forward layer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
