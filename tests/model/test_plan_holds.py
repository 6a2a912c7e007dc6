"""What a plan says is the least, works, for every kind of model and every use; what is used then is within it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from dynamic import MIB, layout
from serving import http_server

import superllama
from superllama import Context, Model, _plan, cli

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


@pytest.mark.parametrize(
    ("use", "flags"), [("server", []), ("server", ["-np", 4]), ("llm", ["-np", 4, "--kv-unified"])], ids=str
)
@pytest.mark.parametrize("name", ["llama-dense", "gemma3-dense", "gpt-oss-moe", "falcon-h1-dense"])
def test_the_least_for_a_server_serves(
    name: str, use: _plan.Use, flags: list[object], architectures: dict[str, Path], tmp_path: Path
) -> None:
    """Four clients at once, prompts of more than an ubatch; with less the server does not start."""
    params, c = superllama.ModelParams(), superllama.ContextParams(n_ctx=1024, n_ubatch=64, n_threads=1)
    context, n_outputs = _plan.for_use(c, use, 4 if flags else None)
    (least,) = _plan.library_plan(architectures[name], params, context, [1], n_outputs=n_outputs)
    (all_logits,) = _plan.library_plan(architectures[name], params, context, [1])
    assert least.mem_least_bytes <= all_logits.mem_least_bytes
    flags = ["-c", 1024, "-ub", 64, *flags]
    budget = ["--mem-budget", least.mem_least_bytes]
    with http_server(architectures[name], tmp_path / "log", *flags, *budget) as server, ThreadPoolExecutor(4) as pool:
        prompts = [[*range(10 + i, 110 + i)] for i in range(4)]
        answers = list(pool.map(lambda p: server.complete(p, n_predict=8, ignore_eos=True), prompts))
        assert [a["tokens_predicted"] for a in answers] == [8] * 4
    budget[1] = least.mem_least_bytes - 2 * MIB
    with (
        pytest.raises(AssertionError, match="the least that works is"),
        http_server(architectures[name], tmp_path / "log", *flags, *budget),
    ):
        pass


def test_uses_have_parameters_of_their_own() -> None:
    given = superllama.ContextParams(n_ctx=4096, swa_full=True)
    server, n_outputs = _plan.for_use(given, "server", 8)
    assert (server.n_ctx, server.n_seq_max, server.kv_unified, server.swa_full, n_outputs) == (4096, 8, False, True, 8)
    assert _plan.for_use(given, "server", None)[0].kv_unified
    assert _plan.for_use(given, "llm", 8)[0].kv_unified
    assert _plan.for_use(superllama.ContextParams(kv_unified=True), "server", 8)[0].kv_unified
    texts, n_outputs = _plan.for_use(superllama.ContextParams(), "perplexity", None)
    assert (texts.n_ctx, texts.n_seq_max, n_outputs) == (2048, 4, 0)
    assert _plan.for_use(superllama.ContextParams(), "embed", None)[0].embeddings
    assert not _plan.for_use(superllama.ContextParams(), "completion", None)[0].swa_full
    assert set(cli.USES) == set(get_args(_plan.Use))
    for wrong in (("generate", 3), ("server", 0), ("chat", None)):
        with pytest.raises(ValueError, match="use"):
            _plan.for_use(given, *wrong)  # type: ignore[arg-type]
