"""A tiny random projector, written with gguf-py: it makes a model of tiny_model.write_llama() that sees and hears."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny_model import N_EMBD, finish

IMAGE_SIZE, PATCH_SIZE = 56, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2  # of every image, whatever its size: it is scaled
SOUND_RATE, SOUND_FRAME = 16000, 640  # samples a second, and in one token
_WIDTH, _HEADS, _FF = 32, 2, 64


def write_projector(path: Path, *, sees: bool = True, hears: bool = True, n_embd: int = N_EMBD, seed: int = 5) -> Path:
    """One layer of a vision transformer, and a matrix for sound: of the kinds that the library loads, the plainest."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "clip")
    w.add_bool("clip.has_vision_encoder", sees)
    w.add_bool("clip.has_audio_encoder", hears)

    def matrix(name: str, *shape: int) -> None:
        w.add_tensor(f"{name}.weight", (rng.standard_normal(shape) * 0.2).astype(np.float32))

    def pair(name: str, rows: int, *columns: int) -> None:
        matrix(name, rows, *columns)
        w.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(_WIDTH, np.float32))

    if sees:
        _keys(w, "vision", "janus_pro", n_embd, n_layer=1)
        w.add_uint32("clip.vision.image_size", IMAGE_SIZE)
        w.add_uint32("clip.vision.patch_size", PATCH_SIZE)
        w.add_array("clip.vision.image_mean", [0.5] * 3)
        w.add_array("clip.vision.image_std", [0.5] * 3)
        pair("v.patch_embd", _WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
        matrix("v.position_embd", IMAGE_TOKENS, _WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            pair(f"v.blk.0.{name}", _WIDTH, _WIDTH)
        pair("v.blk.0.ffn_up", _FF, _WIDTH)
        pair("v.blk.0.ffn_down", _WIDTH, _FF)
        for name in ("v.blk.0.ln1", "v.blk.0.ln2", "v.post_ln"):
            norm(name)
        pair("mm.0", n_embd, _WIDTH)
        pair("mm.1", n_embd, n_embd)
    if hears:
        _keys(w, "audio", "gemma4ua", n_embd, n_layer=0)
        w.add_uint32("clip.audio.num_mel_bins", SOUND_FRAME)
        matrix("mm.a.input_projection", n_embd, SOUND_FRAME)
    return finish(w, path)


def _keys(w: gguf.GGUFWriter, kind: str, projector: str, n_embd: int, n_layer: int) -> None:
    w.add_string(f"clip.{kind}.projector_type", projector)
    for key, value in (
        ("embedding_length", _WIDTH),
        ("attention.head_count", _HEADS),
        ("feed_forward_length", _FF),
        ("block_count", n_layer),
        ("projection_dim", n_embd),
    ):
        w.add_uint32(f"clip.{kind}.{key}", value)
    w.add_float32(f"clip.{kind}.attention.layer_norm_epsilon", 1e-5)
