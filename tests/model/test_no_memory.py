"""Any allocation of a decode may fail: the call is an error, and the next one computes what it would have computed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dynamic import MIB, budgets
from running import Runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is preloaded")

SCRIPT = """
import ctypes, sys, time
import numpy as np
import superllama
shim = ctypes.CDLL(sys.argv[2])
shim.new_arm.argtypes = [ctypes.c_long]
options = {"mem_budget": "1GiB", "devices": []} if sys.argv[3] == "dynamic" else {}
prompt, more = list(range(5, 60)), list(range(60, 75))
with superllama.Model(sys.argv[1], **options) as model:
    paged_kv = sys.argv[3] == "dynamic"
    with superllama.Context(model, n_ctx=256, n_ubatch=32, n_seq_max=2, n_threads=1, paged_kv=paged_kv) as ctx:
        ctx.decode(prompt)
        ctx.decode(more)
        expected = ctx.logits().copy()
        failed = passed = 0
        after = 0
        while passed < 3:
            ctx.clear()
            ctx.decode(prompt)
            if sys.argv[3] == "dynamic" and after < 40 and "mamba" in sys.argv[1]:
                time.sleep(0.3)  # so that the look at the cores is due, which allocates too
            shim.new_arm(after)
            try:
                ctx.decode(more)
                has_failed = shim.new_failed()
            except superllama.DecodeError as e:
                has_failed = shim.new_failed()
                assert has_failed, e
                failed += 1
                if ctx.seq_pos_max(0) != len(prompt) - 1:  # a state that could not go back
                    ctx.clear()
                    ctx.decode(prompt)
                ctx.decode(more)
            assert np.array_equal(ctx.logits(), expected), after
            passed += not has_failed
            after += 1 if after < 40 else 7
print(failed)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the library that injects faults")
    path = tmp_path_factory.mktemp("shim") / "new_shim.so"
    source = Path(__file__).resolve().parents[1] / "new_shim.cpp"
    subprocess.run([compiler, "-O1", "-Wall", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


@pytest.mark.parametrize("kind", ["stock", "dynamic"])
@pytest.mark.parametrize("model", ["llama-dense", "gemma3-dense", "mamba-dense", "lfm2-dense", "qwen3moe-moe"])
def test_no_memory_in_the_middle(
    architectures: dict[str, Path], model: str, kind: str, shim: Path, run_python: Runner
) -> None:
    done = run_python(SCRIPT, architectures[model], shim, kind, env=os.environ | {"LD_PRELOAD": str(shim)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


AROUND = """
import ctypes, sys
import numpy as np
import superllama
path, shim, what, metrics = sys.argv[1], ctypes.CDLL(sys.argv[2]), sys.argv[3], sys.argv[4]
least, full = int(sys.argv[5]), int(sys.argv[6])
shim.new_arm.argtypes = [ctypes.c_long]
large, small = least + (full - least) // 2, least + (full - least) // 8
prompt = list(range(5, 60))

def context(model):
    return superllama.Context(
        model, n_ctx=256, n_seq_max=2, kv_unified=True, n_ubatch=32, n_threads=1, paged_kv=True,
        metrics_file=metrics, metrics_interval_ms=60000,
    )

def steps(model, ctx):
    if what == "close":
        yield ctx.close
    elif what == "make":
        yield lambda: context(model).close()
    elif what == "budget":
        yield lambda: model.set_budget(small)
        yield lambda: model.set_budget(large)
    elif what == "state":
        state = ctx.state_save()
        yield lambda: ctx.state_save()
        yield lambda: ctx.state_load(state)

with superllama.Model(path, mem_budget=large, devices=[]) as model, context(model) as other:
    other.decode(prompt)
    expected = other.logits().copy()
    failed = passed = after = 0
    while passed < 3:
        ctx = context(model)
        ctx.decode(prompt)
        has_failed = False
        for step in steps(model, ctx):
            shim.new_arm(after)
            try:
                step()
                has_failed |= bool(shim.new_failed())
            except (superllama.Error, ValueError) as e:
                assert shim.new_failed(), e
                has_failed = True
        ctx.close()
        model.set_budget(large)
        other.clear()
        other.decode(prompt)
        assert np.array_equal(other.logits(), expected), after
        failed += has_failed
        passed += not has_failed
        after += 1 if after < 100 else 13
    held = sum(model.memory().values())
    assert held <= large, (held, large)
print(failed)
"""


@pytest.mark.parametrize("what", ["close", "make", "budget", "state"])
@pytest.mark.parametrize("model", ["llama-dense", "qwen3moe-moe", "lfm2-dense"])
def test_no_memory_around_a_decode(
    architectures: dict[str, Path], model: str, what: str, shim: Path, run_python: Runner, tmp_path: Path
) -> None:
    """A context made or closed, a budget changed, a state saved or loaded: an error, or done all the same."""
    least, full = budgets(architectures[model], {"n_ctx": 256, "n_ubatch": 32, "n_threads": 1})
    least += 16 * MIB  # for three contexts
    done = run_python(
        AROUND,
        architectures[model],
        shim,
        what,
        tmp_path / "metrics",
        least,
        full + 16 * MIB,
        env=os.environ | {"LD_PRELOAD": str(shim)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0
