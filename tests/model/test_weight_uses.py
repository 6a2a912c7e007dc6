"""Weights by what a graph does with them: looked up by rows, multiplied with, chosen by a router, on several splits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model as tiny
from bench import make_model
from dynamic import CONTEXT, MIB, layout
from rpc_devices import NO_GPU, rpc_server
from running import Runner

import superllama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

TOKENS = [30, 40, 50, 60]


def logits(path: Path, **kwargs: object) -> np.ndarray:
    with (
        superllama.Model(path, use_extra_bufts=False, **kwargs) as model,
        superllama.Context(model, **CONTEXT) as ctx,
    ):
        rows = []
        for token in TOKENS:
            ctx.decode([token])
            rows.append(ctx.logits()[0].copy())
        ctx.decode([t + 100 for t in TOKENS])
        return np.stack([*rows, ctx.logits()[0].copy()])


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bitnet(tmp_path_factory.mktemp("bitnet") / "bitnet.gguf")


@pytest.mark.parametrize("async_prefetch", [False, True])
def test_an_embedding_that_is_multiplied_with(bitnet: Path, async_prefetch: bool) -> None:
    expected = logits(bitnet)
    assert np.count_nonzero(expected) == expected.size
    assert np.array_equal(logits(bitnet, dynamic_layers=True, async_prefetch=async_prefetch), expected)


def test_an_embedding_that_is_multiplied_with_counts(tmp_path: Path) -> None:
    path = tiny.write_bitnet(tmp_path / "wide.gguf", n_embd=2048, n_ff=256)
    with (
        superllama.Model(path, dynamic_layers=True, use_extra_bufts=False) as model,
        superllama.Context(model, **CONTEXT) as ctx,
    ):
        before = model.memory()
        ctx.decode([30])
        after = model.memory()
    whole = 4 * 2048 * model_vocabulary()
    assert before["rows"] <= after["rows"] + MIB
    assert after["resident"] - before["resident"] >= whole
    assert after["rows"] == 0


def model_vocabulary() -> int:
    return len(tiny.byte_vocabulary()[0])


# ---------------------------------------------------------------- blocks that are in use at once


def write_interleaved(path: Path, n: int = 512) -> Path:
    """A llama whose file has matrices beside each other that the graph uses far apart: its blocks are long in use."""
    rng = np.random.default_rng(5)
    w = tiny.llama_writer(path, n, tiny.N_LAYER, n)
    shapes = dict(tiny.llama_tensors(n, tiny.N_LAYER, n))
    first = ["token_embd", "output", "output_norm"]
    order = ["attn_q", "ffn_down", "attn_output", "ffn_up", "attn_k", "attn_v", "ffn_gate", "attn_norm", "ffn_norm"]
    names = [f"{name}.weight" for name in first]
    names += [f"blk.{i}.{name}.weight" for i in range(tiny.N_LAYER) for name in order]
    assert sorted(names) == sorted(shapes)
    for name in names:
        shape = shapes[name]
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.05
        w.add_tensor(name, data.astype(np.float32))
    return tiny.finish(w, path)


@pytest.mark.parametrize("async_prefetch", [False, True])
def test_the_least_budget_works_and_so_does_more(tmp_path: Path, async_prefetch: bool) -> None:
    path = write_interleaved(tmp_path / "interleaved.gguf", n=1024)
    expected = logits(path)
    plan = layout(path, dynamic_layers=True, use_extra_bufts=False)
    assert plan.mem_least_bytes < plan.mem_full_bytes
    for extra in range(0, plan.mem_full_bytes - plan.mem_least_bytes + 4 * MIB, 3 * MIB):
        budget = plan.mem_least_bytes + extra
        found = logits(path, dynamic_layers=True, async_prefetch=async_prefetch, mem_budget=budget)
        assert np.array_equal(found, expected), extra


# ---------------------------------------------------------------- a graph in several splits

SPLITS = """
import ctypes, faulthandler, sys
import numpy as np
import superllama

faulthandler.dump_traceback_later(120, exit=True)
path, endpoint, async_prefetch = sys.argv[1], sys.argv[2], sys.argv[3] == "async"
shim = ctypes.CDLL(None)
superllama.add_rpc_server(endpoint)
options = dict(dynamic_layers=True, async_prefetch=async_prefetch, use_extra_bufts=False,
               override_tensor={"_exps": "CPU"}, mem_budget=int(sys.argv[4]))
with superllama.Model(path, **options) as model:
    with superllama.Context(model, n_ctx=256, n_ubatch=32, n_threads=1) as ctx:
        def run():
            rows = []
            for token in range(20, 40):
                ctx.decode([token])
                rows.append(ctx.logits()[0].copy())
            ctx.clear()
            return np.stack(rows)

        reference = run()
        assert any(layer.tier == "device" for layer in model.layers())
        n_errors = 0
        for after in (0, 3, 10):
            shim.fault_arm(after, 1 << 30, 0)
            try:
                for token in range(20, 60):
                    ctx.decode([token])
            except superllama.DecodeError as e:
                assert "Input/output error" in str(e), e
                n_errors += 1
            shim.fault_arm(0, 0, 0)
            ctx.clear()
            assert np.array_equal(run(), reference)
        print(n_errors)
"""


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_failed_read_ends_all_splits(
    run_python: Runner, demo_model: Path, tmp_path: Path, fault_shim: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts on the host, the rest on a device: after an error nobody reads experts for the splits that follow."""
    path = tmp_path / "moe.gguf"
    spec = make_model.Spec(kind="moe", n_layer=4, n_embd=512, n_expert=16, n_expert_used=4, n_ff=512)
    make_model.make_model(path, demo_model, spec)
    for name, value in {**NO_GPU, "LD_PRELOAD": str(fault_shim), "FAULT_PATH": str(path)}.items():
        monkeypatch.setenv(name, value)
    with rpc_server() as server:
        plan = layout(path, {**CONTEXT, "n_ubatch": 32}, dynamic_layers=True, use_extra_bufts=False)
        budget = (plan.mem_least_bytes + plan.mem_full_bytes) // 2
        done = run_python(SPLITS, path, server.endpoint, mode, budget)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "3\n"
