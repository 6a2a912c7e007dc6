"""What a plan says is the least, works, for every kind of model and every use; what is used then is within it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamic import layout

import superllama
from superllama import Context, Model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

# dense, experts, windows, recurrent states alone and beside attention, models that look ahead, latent attention
KINDS = [
    "llama-dense",
    "qwen3-dense",
    "gemma2-dense",
    "gemma3-dense",
    "gpt-oss-moe",
    "llama4-moe",
    "qwen3moe-moe",
    "deepseek2-moe",
    "mamba-dense",
    "lfm2-dense",
    "falcon-h1-dense",
    "qwen3next-moe",
    "dream-dense",
    "llada-moe-moe",
]
USES: dict[str, dict[str, Any]] = {
    "generate": {"n_ubatch": 64},
    "window": {"n_ubatch": 64, "swa_full": False},
    "embed": {"embeddings": True, "pooling": "mean"},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("use", USES)
def test_the_least_that_a_plan_names_works(name: str, use: str, architectures: dict[str, Path]) -> None:
    context = {"n_ctx": 256, "n_threads": 1, **USES[use]}
    least = layout(architectures[name], context).mem_least_bytes
    tokens = np.random.default_rng(1).integers(3, 100, 200)
    with Model(architectures[name], dynamic_layers=True, mem_budget=least) as model, Context(model, **context) as ctx:
        if use == "embed":
            ctx.decode(tokens[:100])
        else:
            for part in np.split(tokens, 4):
                ctx.decode(part)
        assert sum(model.memory().values()) <= least


@pytest.mark.parametrize("name", ["llama-dense", "gemma3-dense"])
def test_less_than_the_least_is_refused_by_name(name: str, architectures: dict[str, Path]) -> None:
    context = {"n_ctx": 256, "n_threads": 1, "n_ubatch": 64}
    least = layout(architectures[name], context).mem_least_bytes
    with (
        pytest.raises(superllama.Error, match="the least that works is"),
        Model(architectures[name], dynamic_layers=True, mem_budget=least - (1 << 20)) as model,
    ):
        Context(model, **context)
