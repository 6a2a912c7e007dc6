"""Weights that cannot be read: the decode call says so, the process lives, and the next call is exact."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from running import Runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

# what the scripts have in common: a reference without dynamic layers, and a model that streams
PRELUDE = """
import ctypes, os, sys, time
import numpy as np
import superllama

path, async_prefetch = sys.argv[1], sys.argv[2] == "async"
CONTEXT = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1}
TOKENS = list(range(1000, 1008))

def logits(ctx):
    rows = []
    for token in TOKENS:
        ctx.decode([token])
        rows.append(ctx.logits()[0].copy())
    ctx.seq_remove(0)
    return np.stack(rows)

def streaming(path):
    model = superllama.Model(path, dynamic_layers=True, async_prefetch=async_prefetch, use_extra_bufts=False,
                             mem_budget="60MiB")
    return model, superllama.Context(model, **CONTEXT)
"""

TRUNCATED = (
    PRELUDE
    + """
model, ctx = streaming(path)
logits(ctx)
assert ctx.metrics().layers_evicted > 10
os.truncate(path, 1 << 20)
for _ in range(2):
    try:
        ctx.decode([1])
    except superllama.DecodeError as e:
        print(e)
assert superllama.memory().resident > 0
ctx.close(); model.close()
print("alive")
"""
)

TRUNCATED_STOCK = """
import os, sys
import superllama

model = superllama.Model(sys.argv[1], load_mode="mmap", use_extra_bufts=False)
ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
ctx.decode([1])
print("loaded", flush=True)
os.truncate(sys.argv[1], 1 << 20)
ctx.decode([1])
print("alive")
"""

REPLACED = (
    PRELUDE
    + """
with superllama.Model(path, use_extra_bufts=False) as plain, superllama.Context(plain, **CONTEXT) as ctx:
    reference = logits(ctx)
model, ctx = streaming(path)
assert np.array_equal(logits(ctx), reference)
with open(path + ".new", "wb") as f:
    f.write(bytes(os.path.getsize(path)))
os.replace(path + ".new", path)
before = ctx.metrics().weight_bytes_read
for _ in range(2):
    assert np.array_equal(logits(ctx), reference)
assert ctx.metrics().weight_bytes_read - before > 2 * len(TOKENS) * 20_000_000
print("exact")
"""
)

ADDRESS_SPACE = """
import resource, sys
import superllama
from superllama._native import lib

def address_space():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[0]) * resource.getpagesize()

small = superllama.Model(sys.argv[1], vocab_only=True)
small.close()
resource.setrlimit(resource.RLIMIT_AS, (address_space() + (int(sys.argv[2]) << 20), resource.RLIM_INFINITY))
try:
    model = superllama.Model(sys.argv[1], dynamic_layers=True, use_extra_bufts=False, mem_budget="60MiB")
except superllama.ModelError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with superllama.Model(sys.argv[1], dynamic_layers=True, use_extra_bufts=False, mem_budget="60MiB") as model:
    superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1).decode([1])
print("alive")
"""


@pytest.fixture
def copy(demo_model: Path, tmp_path: Path) -> Path:
    return shutil.copy(demo_model, tmp_path / "model.gguf")


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_file_cut_short_is_an_error(copy: Path, mode: str, run_python: Runner) -> None:
    done = run_python(TRUNCATED, copy, mode)
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last == "alive"
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("the weights of model.gguf could not be read: ")
        assert "now 1048576" in error


def test_stock_dies_of_it(copy: Path, run_python: Runner) -> None:
    done = run_python(TRUNCATED_STOCK, copy)
    assert done.stdout == "loaded\n"
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_file_replaced_by_another_goes_on(copy: Path, mode: str, run_python: Runner) -> None:
    done = run_python(REPLACED, copy, mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"


def test_too_little_address_space(copy: Path, run_python: Runner) -> None:
    done = run_python(ADDRESS_SPACE, copy, 20)
    assert done.returncode == 0, done.stderr
    error, last = done.stdout.splitlines()
    assert "address space for weights; is it limited (ulimit -v)?" in error
    assert last == "alive"


# ---------------------------------------------------------------- the disk

FAULTS = (
    PRELUDE
    + """
EIO, SHORT, UNEVEN, END, EINTR, NODIRECT = range(6)
shim = ctypes.CDLL(None)
with superllama.Model(path, use_extra_bufts=False) as plain, superllama.Context(plain, **CONTEXT) as ctx:
    reference = logits(ctx)
model, ctx = streaming(path)
assert np.array_equal(logits(ctx), reference)

def disarm():
    shim.fault_arm(0, 0, 0)
    while ctx.metrics().prefetch_pending:  # what was read ahead meanwhile fails late
        time.sleep(0.001)

def raises(after, count, kind, text):
    shim.fault_arm(after, count, kind)
    position = 0
    try:
        for position, token in enumerate(TOKENS):
            ctx.decode([token])
    except superllama.DecodeError as e:
        assert text in str(e) and "model.gguf could not be read" in str(e), e
    else:
        raise AssertionError("no error")
    assert shim.fault_count() > 0
    disarm()
    # the token that failed is decoded now, and all is as if nothing had been
    for i in range(position, len(TOKENS)):
        ctx.decode([TOKENS[i]])
        assert np.array_equal(ctx.logits()[0], reference[i]), (i, after, kind)
    ctx.seq_remove(0)
    assert np.array_equal(logits(ctx), reference)

def harmless(after, count, kind):
    shim.fault_arm(after, count, kind)
    assert np.array_equal(logits(ctx), reference), (after, kind)
    assert shim.fault_count() > 0
    disarm()

MANY = 1 << 30
for after in (0, 7, 100):
    raises(after, MANY, EIO, "Input/output error")
    raises(after, MANY, END, "cut short")
    if not async_prefetch:
        raises(after, 1, EIO, "Input/output error")
        raises(after, 1, END, "cut short")
    for kind in (SHORT, UNEVEN, EINTR, NODIRECT):
        harmless(after, 1, kind)
for kind in (SHORT, UNEVEN, NODIRECT):
    harmless(0, MANY if kind == NODIRECT else 500, kind)
if async_prefetch:
    shim.fault_arm(20, 1, EIO)
    try:  # an error unless the block was only read ahead, which is tried again
        assert np.array_equal(logits(ctx), reference)
    except superllama.DecodeError:
        ctx.seq_remove(0)
    disarm()
    assert np.array_equal(logits(ctx), reference)
    assert ctx.metrics().prefetch_failed > 0
assert ctx.metrics().layers_evicted > 1000
print("exact")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_reads_that_fail(demo_model: Path, tmp_path: Path, mode: str, fault_shim: Path, run_python: Runner) -> None:
    path = shutil.copy(demo_model, tmp_path / "model.gguf")
    env = {**os.environ, "LD_PRELOAD": str(fault_shim), "FAULT_PATH": str(path)}
    done = run_python(FAULTS, path, mode, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"
