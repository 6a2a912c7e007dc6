"""Weights that cannot be read: the decode call says so, the process lives, and the next call is exact."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from dynamic import budgets
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
                             mem_budget="72MiB")
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

TOUCHED = (
    PRELUDE
    + """
with superllama.Model(path, use_extra_bufts=False) as plain, superllama.Context(plain, **CONTEXT) as ctx:
    reference = logits(ctx)
model, ctx = streaming(path)
for _ in range(3):
    os.utime(path)
    os.chmod(path, 0o600)
    assert np.array_equal(logits(ctx), reference)
print("exact")
"""
)

OVERWRITTEN = (
    PRELUDE
    + """
model, ctx = streaming(path)
logits(ctx)
size = os.path.getsize(path)
with open(path, "r+b") as f:
    f.seek(size // 2)
    f.write(bytes(size - size // 2))
os.utime(path, (0, 0))
for _ in range(2):
    try:
        ctx.decode([1])
    except superllama.DecodeError as e:
        print(e)
print(size)
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
    model = superllama.Model(sys.argv[1], dynamic_layers=True, use_extra_bufts=False, mem_budget="72MiB")
except superllama.ModelError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with superllama.Model(sys.argv[1], dynamic_layers=True, use_extra_bufts=False, mem_budget="72MiB") as model:
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
        assert error.startswith("the weights could not be read: ")
        assert "model.gguf" in error
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


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_file_that_is_touched_goes_on(copy: Path, mode: str, run_python: Runner) -> None:
    done = run_python(TOUCHED, copy, mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"


def test_a_file_that_is_overwritten_is_an_error(copy: Path, run_python: Runner) -> None:
    done = run_python(OVERWRITTEN, copy, "async")
    assert done.returncode == 0, done.stderr
    *errors, size = done.stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert "model.gguf changed while the model was in use" in error
        assert f"it still has {size} bytes, but others at offset " in error


def test_without_proc(copy: Path, fault_shim: Path, run_python: Runner) -> None:
    done = run_python(TOUCHED, copy, "async", env={**os.environ, "LD_PRELOAD": str(fault_shim), "FAULT_NO": "proc"})
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
        assert text in str(e) and "model.gguf" in str(e) and "the weights could not be read" in str(e), e
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


# a recurrent state that was changing when a graph failed is neither old nor new
LOST = """
import ctypes, sys
import numpy as np
import superllama

path, budget = sys.argv[1], int(sys.argv[2])
CONTEXT = {"n_ctx": 3 * 256, "n_ubatch": 64, "n_seq_max": 3, "n_threads": 1}
EIO, MANY = 0, 1 << 30
shim = ctypes.CDLL(None)
plain = superllama.Context(superllama.Model(path, use_extra_bufts=False), **CONTEXT)
streaming = superllama.Context(superllama.Model(path, dynamic_layers=True, use_extra_bufts=False, mem_budget=budget),
                               **CONTEXT)

def same(tokens, seq):
    for ctx in (plain, streaming):
        ctx.decode(tokens, seq=seq)
    assert np.array_equal(plain.logits(), streaming.logits()), seq

def refused(text, after, seq):
    length = streaming.seq_pos_max(seq)
    shim.fault_arm(after or 0, 0 if after is None else MANY, EIO)
    try:
        streaming.decode([5], seq=seq)
    except superllama.DecodeError as e:
        assert text in str(e) and "Input/output error" in str(e), e
    else:
        raise AssertionError("no error")
    shim.fault_arm(0, 0, 0)
    assert streaming.seq_pos_max(seq) == length

PROMPT = list(range(20))
for seq in (0, 1):
    same(PROMPT, seq)
refused("could not be read", 0, 0)
refused("sequence 0 is lost", None, 0)
streaming.seq_copy(0, 2)
for seq in (0, 2):
    refused(f"sequence {seq} is lost", None, seq)
same([6], 1)
for ctx in (plain, streaming):
    ctx.seq_remove(0)
same(PROMPT, 0)
same([7], 0)
for ctx in (plain, streaming):
    ctx.seq_copy(1, 2)
same([8], 2)
print("exact")
"""


@pytest.mark.parametrize("family", ["falcon-h1-dense", "granitehybrid-dense"])
def test_a_recurrent_state_that_is_lost(
    family: str, architectures: dict[str, Path], tmp_path: Path, fault_shim: Path, run_python: Runner
) -> None:
    path = shutil.copy(architectures[family], tmp_path / "model.gguf")
    least, full = budgets(
        path, {"n_ctx": 3 * 256, "n_ubatch": 64, "n_seq_max": 3, "n_threads": 1}, use_extra_bufts=False
    )
    assert least < full
    env = {**os.environ, "LD_PRELOAD": str(fault_shim), "FAULT_PATH": str(path)}
    done = run_python(LOST, path, least, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"
