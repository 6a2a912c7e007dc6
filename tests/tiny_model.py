"""Tiny random models, written with gguf-py: what most tests run on. The same seed makes the same file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 64, 4, 4, 2, 128, 512
WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as")


def byte_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """An SPM vocabulary in which every byte is a token: any text can be written, in parts of characters."""
    tokens, types = ["<unk>", "<s>", "</s>"], [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    pieces = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["▁"] + [f"▁{word}" for word in WORDS]
    tokens += pieces
    types += [gguf.TokenType.NORMAL] * len(pieces)
    return tokens, [-float(i) for i in range(len(tokens))], [int(t) for t in types]


def llama_writer(path: Path, n_embd: int, n_layer: int, n_ff: int, arch: str = "llama") -> gguf.GGUFWriter:
    """With all metadata of a llama, or of one of its relatives, and no tensor yet."""
    tokens, scores, types = byte_vocabulary()
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(N_CTX)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD_KV)
    w.add_rope_dimension_count(n_embd // N_HEAD)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(True)
    return w


def llama_tensors(n_embd: int, n_layer: int, n_ff: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes; norms have one dimension."""
    n_vocab = len(byte_vocabulary()[0])
    n_kv = n_embd // N_HEAD * N_HEAD_KV
    yield "token_embd.weight", (n_vocab, n_embd)
    yield "output.weight", (n_vocab, n_embd)
    yield "output_norm.weight", (n_embd,)
    for i in range(n_layer):
        yield f"blk.{i}.attn_norm.weight", (n_embd,)
        yield f"blk.{i}.ffn_norm.weight", (n_embd,)
        for name, rows, columns in (
            ("attn_q", n_embd, n_embd),
            ("attn_k", n_kv, n_embd),
            ("attn_v", n_kv, n_embd),
            ("attn_output", n_embd, n_embd),
            ("ffn_gate", n_ff, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            yield f"blk.{i}.{name}.weight", (rows, columns)


def write_llama(path: Path, seed: int = 1) -> Path:
    """A llama of four layers, about 0.7 MB."""
    rng = np.random.default_rng(seed)
    w = llama_writer(path, N_EMBD, N_LAYER, N_FF)
    for name, shape in llama_tensors(N_EMBD, N_LAYER, N_FF):
        scale = 1.0 if name == "token_embd.weight" else 0.2
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * scale
        w.add_tensor(name, data.astype(np.float32))
    return finish(w, path)


def write_zeros(path: Path, n_embd: int, n_layer: int, n_ff: int) -> Path:
    """A llama of any size that takes no room on disk: its weights are a hole in the file."""
    w = llama_writer(path, n_embd, n_layer, n_ff)
    size = 0
    for name, shape in llama_tensors(n_embd, n_layer, n_ff):
        n_bytes = 4 * math.prod(shape)
        w.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes)
        size += gguf.GGUFWriter.ggml_pad(n_bytes, w.data_alignment)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, w.data_alignment)
    os.truncate(path, header + size)
    return path


def write_bitnet(path: Path, n_embd: int = 256, n_ff: int = 512, seed: int = 4) -> Path:
    """A model whose token embedding is its output matrix too, without saying so: its graph multiplies with it."""
    rng = np.random.default_rng(seed)
    w = llama_writer(path, n_embd, N_LAYER, n_ff, "bitnet")
    shapes = [s for s in llama_tensors(n_embd, N_LAYER, n_ff) if s[0] != "output.weight"]
    for i in range(N_LAYER):
        shapes += [(f"blk.{i}.attn_sub_norm.weight", (n_embd,)), (f"blk.{i}.ffn_sub_norm.weight", (n_ff,))]
    for name, shape in shapes:
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.1
        w.add_tensor(name, data.astype(np.float32))
    return finish(w, path)


def write_lora(path: Path, rank: int = 4, seed: int = 2) -> Path:
    """An adapter for write_llama()'s model that changes the queries of its first layer."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 8.0)
    w.add_tensor("blk.0.attn_q.weight.lora_a", rng.standard_normal((rank, N_EMBD)).astype(np.float32))
    w.add_tensor("blk.0.attn_q.weight.lora_b", rng.standard_normal((N_EMBD, rank)).astype(np.float32))
    return finish(w, path)


def write_bert(path: Path, seed: int = 3, pooling: gguf.PoolingType = gguf.PoolingType.MEAN) -> Path:
    """An encoder of two layers: it has no KV cache and generates nothing. With pooling RANK, a reranker."""
    rng = np.random.default_rng(seed)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = special + [f"▁{letter}" for letter in letters] + letters
    n_layer, n_ctx = 2, 64
    w = gguf.GGUFWriter(path, "bert")
    w.add_context_length(n_ctx)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_layer_norm_eps(1e-5)
    w.add_causal_attention(False)
    w.add_pooling_type(pooling)
    w.add_tokenizer_model("bert")
    w.add_token_list(tokens)
    w.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    w.add_token_type_count(2)
    w.add_pad_token_id(0)
    w.add_unk_token_id(1)
    w.add_bos_token_id(2)
    w.add_sep_token_id(3)
    w.add_mask_token_id(4)

    def pair(name: str, rows: int, columns: int) -> None:
        w.add_tensor(f"{name}.weight", (rng.standard_normal((rows, columns)) * 0.2).astype(np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(N_EMBD, np.float32))

    for name, rows in (("token_embd", len(tokens)), ("token_types", 2), ("position_embd", n_ctx)):
        w.add_tensor(f"{name}.weight", rng.standard_normal((rows, N_EMBD)).astype(np.float32))
    norm("token_embd_norm")
    for i in range(n_layer):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            pair(f"blk.{i}.{name}", N_EMBD, N_EMBD)
        pair(f"blk.{i}.ffn_up", N_FF, N_EMBD)
        pair(f"blk.{i}.ffn_down", N_EMBD, N_FF)
        norm(f"blk.{i}.attn_output_norm")
        norm(f"blk.{i}.layer_output_norm")
    if pooling == gguf.PoolingType.RANK:
        pair("cls", N_EMBD, N_EMBD)
        pair("cls.output", 1, N_EMBD)
    return finish(w, path)


def finish(w: gguf.GGUFWriter, path: Path) -> Path:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
