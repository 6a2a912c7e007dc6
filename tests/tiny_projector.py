"""A tiny random projector, written with gguf-py: it makes a model of tiny_model.write_llama() that sees and hears."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny_model import N_EMBD, finish

IMAGE_SIZE, PATCH_SIZE = 56, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2  # of every image, whatever its size: it is scaled
SOUND_RATE, SOUND_FRAME = 16000, 640  # samples a second, and in one token


def write_projector(
    path: Path,
    *,
    sees: bool = True,
    hears: bool = True,
    n_embd: int = N_EMBD,
    seed: int = 5,
    width: int = 32,
    n_layer: int = 1,
    image_size: int = IMAGE_SIZE,
) -> Path:
    """A vision transformer, and a matrix for sound: of the kinds that the library loads, the plainest. A wide one with
    some layers takes as much memory as a real one."""
    n_tokens, n_ff = (image_size // PATCH_SIZE) ** 2, 2 * width
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
        w.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    if sees:
        _keys(w, "vision", "janus_pro", n_embd, width, n_layer)
        w.add_uint32("clip.vision.image_size", image_size)
        w.add_uint32("clip.vision.patch_size", PATCH_SIZE)
        w.add_array("clip.vision.image_mean", [0.5] * 3)
        w.add_array("clip.vision.image_std", [0.5] * 3)
        pair("v.patch_embd", width, 3, PATCH_SIZE, PATCH_SIZE)
        matrix("v.position_embd", n_tokens, width)
        for i in range(n_layer):
            for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
                pair(f"v.blk.{i}.{name}", width, width)
            pair(f"v.blk.{i}.ffn_up", n_ff, width)
            pair(f"v.blk.{i}.ffn_down", width, n_ff)
            norm(f"v.blk.{i}.ln1")
            norm(f"v.blk.{i}.ln2")
        norm("v.post_ln")
        pair("mm.0", n_embd, width)
        pair("mm.1", n_embd, n_embd)
    if hears:
        _keys(w, "audio", "gemma4ua", n_embd, width, n_layer=0)
        w.add_uint32("clip.audio.num_mel_bins", SOUND_FRAME)
        matrix("mm.a.input_projection", n_embd, SOUND_FRAME)
    return finish(w, path)


def _keys(w: gguf.GGUFWriter, kind: str, projector: str, n_embd: int, width: int, n_layer: int) -> None:
    w.add_string(f"clip.{kind}.projector_type", projector)
    for key, value in (
        ("embedding_length", width),
        ("attention.head_count", width // 16),
        ("feed_forward_length", 2 * width),
        ("block_count", n_layer),
        ("projection_dim", n_embd),
    ):
        w.add_uint32(f"clip.{kind}.{key}", value)
    w.add_float32(f"clip.{kind}.attention.layer_norm_epsilon", 1e-5)
