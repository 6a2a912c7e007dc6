"""Memory that is only reserved counts nowhere: not as data (ulimit -d, overcommit), nor where pages are locked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bench import make_model
from dynamic import MIB
from running import Runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

PRELUDE = """
import ctypes, json, mmap, os, resource, sys
import numpy as np
import superllama

def status(name): # bytes
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(name + ":"))

def load(**kwargs):
    return superllama.Model(sys.argv[1], dynamic_layers=True, async_prefetch=True, **kwargs)

def tokens(model, n=8):
    with superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1) as ctx:
        ctx.decode(model.tokenize("The capital of France is"))
        out = []
        for _ in range(n):
            out.append(int(np.argmax(ctx.logits()[0])))
            ctx.decode(out[-1:])
        return out

with load() as model: # libraries, heap and stacks are there then
    reference = tokens(model)
whole = os.path.getsize(sys.argv[1])
budget = int(sys.argv[2])
"""

DATA = (
    PRELUDE
    + """
before = status("VmData")
with load(mem_budget=budget) as model:
    same = tokens(model) == reference
    with superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1) as ctx:
        ctx.decode([1])
        streaming = status("VmData") - before
        model.set_budget(4 * whole)
        for token in range(100, 200):
            ctx.decode([token])
        everything = status("VmData") - before
        model.set_budget(budget)
        ctx.decode([1])
        again = status("VmData") - before
print(json.dumps({"same": same, "streaming": streaming, "everything": everything, "again": again, "whole": whole}))
"""
)

LIMITED = (
    PRELUDE
    + """
room = budget + (160 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + room, resource.RLIM_INFINITY))
errors = []
try:
    with load() as model:
        tokens(model)
except superllama.Error as e:
    errors.append(str(e))
with load(mem_budget=budget) as model:
    same = tokens(model) == reference
print(json.dumps({"errors": errors, "same": same}))
"""
)

LOCKED = (
    PRELUDE
    + """
libc = ctypes.CDLL(None, use_errno=True)
locks = libc.mlockall(2) == 0 # MCL_FUTURE
try: # what it may lock can be limited, and address space counts
    mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
except OSError:
    locks = False
if not locks:
    print(json.dumps(None))
    sys.exit()
before = status("RssAnon")
with load(mem_budget=budget) as model:
    same = tokens(model) == reference
    taken = status("RssAnon") - before
print(json.dumps({"same": same, "taken": taken, "whole": whole}))
"""
)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("promised") / f"{request.param}.gguf"
    make_model.make_model(path, demo_model, make_model.Spec(kind=request.param, size=400_000_000))
    return path


BUDGET = 200 * MIB
BESIDE = 160 * MIB  # stacks of readers, heaps of threads


def test_only_what_is_used_is_data(model: Path, run_python: Runner) -> None:
    """What vm.overcommit_memory=2 counts, and comes back when the budget does."""
    done = run_python(DATA, model, BUDGET)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["same"]
    assert seen["streaming"] < BUDGET + BESIDE, seen
    assert seen["everything"] > seen["streaming"] + 100 * MIB, seen
    assert seen["again"] < seen["streaming"] + 16 * MIB, seen


@pytest.mark.parametrize("model", ["dense"], indirect=True)  # of experts only those that were chosen take memory
def test_a_limit_of_data(model: Path, run_python: Runner) -> None:
    """The budget fits where the model does not: without one, an error that says so."""
    done = run_python(LIMITED, model, BUDGET)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["errors"]) == 1
    assert "the system has no memory for" in seen["errors"][0]
    assert seen["same"]


def test_locked_pages(model: Path, run_python: Runner) -> None:
    """mlockall() fills every page that can be written: not the address space of the whole model."""
    done = run_python(LOCKED, model, BUDGET)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    if seen is None:
        pytest.skip("this process may not lock memory")
    assert seen["same"]
    assert seen["taken"] < BUDGET + BESIDE, seen
