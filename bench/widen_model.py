#!/usr/bin/env python3
"""Make a real dense model larger: the same answers, from a file of a wanted size.

bench/widen_model.py SmolLM2.gguf --size 1.6GB wide.gguf
bench/widen_model.py SmolLM2.gguf --experts 64 --active 8 mixture.gguf

The feed-forward layers get more neurons, copies of those they have, whose outputs weigh exactly nothing. Every weight
is read and computed for every token as in any dense model of that size, and the logits stay the small one's: for
questions that a random model cannot answer, such as how often its own text repeats.

With --experts each layer becomes a mixture of copies of its feed-forward layer, among which a random router chooses by
what it sees: whichever it takes, the answers are the small model's, up to rounding.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.gguf_stream import CHUNK_BYTES, Chunks, Tensor, copy_keys, write
from bench.sizes import format_size, parse_size

WIDENED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight")
Change: TypeAlias = tuple[list[Tensor], dict[str, int]]  # tensors, values of keys
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


def mixed(tensor: gguf.ReaderTensor, n_expert: int) -> list[Tensor]:
    """A matrix of a feed-forward layer as that of each expert, the first one after a router; others as they are."""
    if not (found := WIDENED.fullmatch(tensor.name)):
        return [widened(tensor, 0)]
    shape = tuple(int(n) for n in reversed(tensor.shape))
    data: np.ndarray = tensor.data
    name = tensor.name.replace(".weight", "_exps.weight")
    tensors = [Tensor(name, (n_expert, *shape), tensor.tensor_type, lambda _: (data for _ in range(n_expert)))]
    if found[1] == "gate":
        std = 1 / np.sqrt(shape[1])
        router = (n_expert, shape[1])
        tensors.insert(0, Tensor(tensor.name.replace("ffn_gate", "ffn_gate_inp"), router, gguf.GGMLQuantizationType.F32,
                                 lambda rng: iter([rng.normal(0, std, router).astype(np.float32)])))  # fmt: skip
    return tensors


def write_as(source: Path, path: Path, what: str, changed: Callable[[gguf.GGUFReader, str, int], Change]) -> None:
    """Write the model with other tensors, and other values of some keys of its architecture."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    key = f"{arch}.feed_forward_length"
    n_ff = reader.fields[key].contents() if key in reader.fields else None
    if not isinstance(n_ff, int) or n_ff % STEP or not any(WIDENED.fullmatch(t.name) for t in reader.tensors):
        raise ValueError(f"{source} has no dense feed-forward layers, all of the same multiple of {STEP} neurons")
    tensors, values = changed(reader, arch, n_ff)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_name(f"{source.stem}, {what}")
    for prefix in ("general.file_type", "general.quantization_version", "tokenizer.", f"{arch}."):
        copy_keys(writer, reader, prefix, values)
    for name in values.keys() - reader.fields.keys():
        writer.add_uint32(name, values[name])
    write(writer, tensors, path, seed=0)


def widen(source: Path, path: Path, size: int) -> int:
    """Write the model; returns its neurons per layer."""
    wide = 0

    def changed(reader: gguf.GGUFReader, arch: str, n_ff: int) -> Change:
        nonlocal wide
        wide = plan(reader.tensors, n_ff, size)
        return [widened(t, wide) for t in reader.tensors], {f"{arch}.feed_forward_length": wide}

    write_as(source, path, f"widened to {format_size(size)}", changed)
    return wide


def mix(source: Path, path: Path, n_expert: int, n_used: int) -> None:
    """Write the model with so many experts in each layer, of which a token takes so many."""
    if not 1 <= n_used <= n_expert:
        raise ValueError(f"--active {n_used}: of {n_expert} experts a token takes 1 to {n_expert}")

    def changed(reader: gguf.GGUFReader, arch: str, n_ff: int) -> Change:
        tensors = [made for t in reader.tensors for made in mixed(t, n_expert)]
        return tensors, {f"{arch}.expert_count": n_expert, f"{arch}.expert_used_count": n_used}

    write_as(source, path, f"a mixture of {n_expert} experts", changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--size", type=parse_size, default=parse_size("1.6GB"), help="of the file: 1.6GB, 300MB")
    kind.add_argument("--experts", type=int, help="of each layer, copies of it")
    parser.add_argument("--active", type=int, default=8, help="experts that a token takes (8)")
    a = parser.parse_args()
    try:
        if a.experts is not None:
            mix(a.model, a.out, a.experts, a.active)
            layers = f"{a.active} of {a.experts} experts in each layer"
        else:
            layers = f"{widen(a.model, a.out, a.size)} neurons in each feed-forward layer"
    except ValueError as error:
        print(f"widen_model: {error}", file=sys.stderr)
        return 2
    print(f"{a.out}: {format_size(a.out.stat().st_size)}, {layers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
