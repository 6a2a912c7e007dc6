"""Any allocation of a decode may fail: the call is an error, and the next one computes what it would have computed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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
