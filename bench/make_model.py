#!/usr/bin/env python3
"""Make a random GGUF model of a wanted size: dense llama or qwen3moe, Q4_0, with a real model's vocabulary.

bench/make_model.py --kind dense --size 1.5GB --vocab SmolLM2.gguf dense.gguf
bench/make_model.py --kind moe --size 1.5GB --experts 128 --active 8 --vocab SmolLM2.gguf moe.gguf
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import moe_design
from bench.gguf_stream import Q4_0_BLOCK, Q4_0_BYTES, Tensor, copy_vocabulary, exact, exact_q4_0, random_q4_0, write
from bench.sizes import format_size, parse_size

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Spec:
    kind: str = "dense"
    size: int = 1_500_000_000  # bytes of the file, met within some percent
    n_layer: int = 0  # 0 = chosen from the size
    n_embd: int = 0
    n_head: int = 0
    n_head_kv: int = 0
    n_expert: int = 128
    n_expert_used: int = 8
    n_ff: int = 0  # per expert for MoE; chosen so that the size comes out
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def plan(spec: Spec, n_vocab: int) -> Spec:
    """Fill in the shape: a width for the size, about as many layers as give usual proportions, then n_ff exactly."""
    moe = spec.kind == "moe"
    narrow, wide = (400e6, float("inf")) if moe else (150e6, 1.2e9)
    n_embd = spec.n_embd or (512 if spec.size < narrow else 1024 if spec.size < wide else 2048)
    n_head = spec.n_head or n_embd // 64
    n_head_kv = spec.n_head_kv or max(1, n_head // 4)
    if n_embd % 128 or n_embd % n_head or n_head % n_head_kv:
        raise ValueError(
            f"width {n_embd} must be a multiple of 128 and of the {n_head} heads, and those a multiple of the "
            f"{n_head_kv} KV heads; change --embd, --heads or --kv-heads"
        )
    weight = Q4_0_BYTES / Q4_0_BLOCK
    per_layer = (2 * n_embd * n_embd + 2 * n_embd * (n_embd // n_head) * n_head_kv) * weight + 8 * n_embd
    per_ff = 3 * n_embd * weight * (spec.n_expert if moe else 1)
    outside = 2 * n_vocab * n_embd * weight + 2_500_000
    usual_ff = n_embd / 2 if moe else 2.75 * n_embd
    n_layer = spec.n_layer or max(8, round((spec.size - outside) / (per_layer + per_ff * usual_ff)))
    n_ff = spec.n_ff or round((spec.size - outside - n_layer * per_layer) / (n_layer * per_ff) / 32) * 32
    if n_ff < 32:
        smallest = outside + n_layer * (per_layer + 32 * per_ff)
        raise ValueError(
            f"--size {format_size(spec.size)} is too small for {n_layer} layers of width {n_embd} and {n_vocab} "
            f"tokens: at least {format_size(smallest)}; or give fewer --layers, fewer --experts or a smaller --embd"
        )
    return replace(spec, n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_head_kv=n_head_kv, n_ff=n_ff)


def dense_tensors(s: Spec, n_vocab: int) -> list[Tensor]:
    kv, std = s.head_dim * s.n_head_kv, 1 / np.sqrt(s.n_embd)
    small = 0.3 / np.sqrt(s.n_layer)  # of the residual stream per layer: the token stays visible through all of them
    out = [
        random_q4_0("token_embd.weight", (n_vocab, s.n_embd), 1.0),
        random_q4_0("output.weight", (n_vocab, s.n_embd), std),
        exact("output_norm.weight", np.ones(s.n_embd)),
    ]
    for il in range(s.n_layer):
        p = f"blk.{il}."
        out += [
            exact(p + "attn_norm.weight", np.ones(s.n_embd)),
            random_q4_0(p + "attn_q.weight", (s.n_embd, s.n_embd), std),
            random_q4_0(p + "attn_k.weight", (kv, s.n_embd), std),
            random_q4_0(p + "attn_v.weight", (kv, s.n_embd), std),
            random_q4_0(p + "attn_output.weight", (s.n_embd, s.n_embd), std * small),
            exact(p + "ffn_norm.weight", np.ones(s.n_embd)),
            random_q4_0(p + "ffn_gate.weight", (s.n_ff, s.n_embd), std),
            random_q4_0(p + "ffn_up.weight", (s.n_ff, s.n_embd), std),
            random_q4_0(p + "ffn_down.weight", (s.n_embd, s.n_ff), small / np.sqrt(s.n_ff)),
        ]
    return out


def moe_tensors(s: Spec, n_vocab: int) -> list[Tensor]:
    res = moe_design.Residual(s.n_embd)
    kv, std = s.head_dim * s.n_head_kv, 1 / np.sqrt(s.n_embd)
    small = 0.15 / np.sqrt(s.n_layer)
    rms = np.sqrt((res.n_token + res.n_const) / s.n_embd)  # of the embedding
    kernel = moe_design.recency_kernel(s.head_dim, ROPE_BASE)
    # so that the context part has unit variance: values have rms 1, averaging leaves sqrt(sum of squared weights),
    # and heads that share a value add up
    group = s.n_head // s.n_head_kv
    context_std = 1 / (np.sqrt((kernel**2).sum()) * np.sqrt(kv) * group)

    def embedding() -> Tensor:
        base = random_q4_0("token_embd.weight", (n_vocab, s.n_embd), 1.0)
        const = np.float16(-1 / 8).view(np.uint16)  # nibble 0 is -8: a block of exact ones
        first = res.n_token // 32

        def make(rng: np.random.Generator):
            for words in base.make(rng):
                words[:, first:, 0] = 0
                words[:, -1, 0] = const
                words[:, -1, 1:] = 0
                yield words

        return Tensor(base.name, base.shape, base.type, make)

    out_norm = np.where(res.writable, 1.0, 0.0)  # the const part would prefer the same tokens for ever
    out = [embedding(), random_q4_0("output.weight", (n_vocab, s.n_embd), std), exact("output_norm.weight", out_norm)]
    routers = np.random.Generator(np.random.SFC64([s.seed, 1 << 32]))
    for il in range(s.n_layer):
        p = f"blk.{il}."
        wo_rows = res.context_rows if il == 0 else res.writable
        wo_std = context_std if il == 0 else std * small
        out += [
            exact(p + "attn_norm.weight", np.full(s.n_embd, rms if il == 0 else 1.0)),
            exact_q4_0(p + "attn_q.weight", lambda: moe_design.recency_heads(res, s.n_head, s.head_dim, ROPE_BASE),
                       (s.n_embd, s.n_embd)),
            exact_q4_0(p + "attn_k.weight", lambda: moe_design.recency_heads(res, s.n_head_kv, s.head_dim, ROPE_BASE),
                       (kv, s.n_embd)),
            random_q4_0(p + "attn_v.weight", (kv, s.n_embd), 1 / np.sqrt(res.n_token)),
            random_q4_0(p + "attn_output.weight", (s.n_embd, s.n_embd), wo_std, wo_rows),
            exact(p + "attn_q_norm.weight", np.ones(s.head_dim)),
            exact(p + "attn_k_norm.weight", np.ones(s.head_dim)),
            exact(p + "ffn_norm.weight", np.ones(s.n_embd)),
            exact(p + "ffn_gate_inp.weight", moe_design.router(routers, res, s.n_expert)),
            random_q4_0(p + "ffn_gate_exps.weight", (s.n_expert, s.n_ff, s.n_embd), std),
            random_q4_0(p + "ffn_up_exps.weight", (s.n_expert, s.n_ff, s.n_embd), std),
            random_q4_0(p + "ffn_down_exps.weight", (s.n_expert, s.n_embd, s.n_ff), small / np.sqrt(s.n_ff) * 3,
                        res.writable),
        ]  # fmt: skip
    return out


def make_model(path: Path, vocab: Path, spec: Spec) -> Spec:
    """Write the model; returns the spec with the chosen shape. The same spec and vocabulary give the same bytes."""
    arch = {"dense": "llama", "moe": "qwen3moe"}.get(spec.kind)
    if arch is None:
        raise ValueError(f"kind {spec.kind!r}: dense or moe")
    writer = gguf.GGUFWriter(None, arch)
    n_vocab = copy_vocabulary(writer, vocab)
    s = plan(spec, n_vocab)
    writer.add_name(f"random {s.kind} {format_size(s.size)}")
    writer.add_block_count(s.n_layer)
    writer.add_context_length(8192)
    writer.add_embedding_length(s.n_embd)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_feed_forward_length(s.n_ff * s.n_expert_used if s.kind == "moe" else s.n_ff)
    if s.kind == "moe":
        writer.add_key_length(s.head_dim)
        writer.add_value_length(s.head_dim)
        writer.add_expert_count(s.n_expert)
        writer.add_expert_used_count(s.n_expert_used)
        writer.add_expert_feed_forward_length(s.n_ff)
    tensors = moe_tensors(s, n_vocab) if s.kind == "moe" else dense_tensors(s, n_vocab)
    write(writer, tensors, path, s.seed)
    return s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=Path, required=True, help="GGUF model whose vocabulary is copied")
    parser.add_argument("--kind", choices=["dense", "moe"], default="dense")
    parser.add_argument("--size", type=parse_size, default=parse_size("1.5GB"), help="of the file: 1.5GB, 300MB")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--embd", type=int, default=0)
    parser.add_argument("--heads", type=int, default=0)
    parser.add_argument("--kv-heads", type=int, default=0)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    spec = Spec(a.kind, a.size, a.layers, a.embd, a.heads, a.kv_heads, a.experts, a.active, 0, a.seed)
    start = time.monotonic()
    try:
        s = make_model(a.out, a.vocab, spec)
    except ValueError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 2
    shape = f"{s.n_layer} layers, width {s.n_embd}, ffn {s.n_ff}"
    if s.kind == "moe":
        shape += f", {s.n_expert_used} of {s.n_expert} experts"
    print(f"{a.out}: {format_size(a.out.stat().st_size)}, {shape}, {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
