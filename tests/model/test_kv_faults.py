"""KV pages that cannot be written or read: the call says so, the process lives, and the next call is exact."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from running import Runner

import superllama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected the Linux way")

# a reference without pages, and a context whose budget holds some of its four sequences
OPEN = """
import ctypes, shutil, sys
import numpy as np
import superllama

path, spill, async_prefetch = sys.argv[1], sys.argv[2], sys.argv[3] == "async"
EIO, NOSPC, MANY = 0, 6, 1 << 30
model = superllama.Model(path)

def contexts(cells, **paging):
    context = {"n_ctx": 4 * cells, "n_seq_max": 4, "n_threads": 1, "flash_attn": "on"}
    paging |= {"spill_dir": spill, "async_prefetch": async_prefetch, "prefetch_threads": 2}
    return superllama.Context(model, **context), superllama.Context(model, **context, paged_kv=True, **paging)

def same(seq, tokens):
    for ctx in (plain, paged):
        ctx.decode(tokens, seq=seq)
    assert np.array_equal(plain.logits(), paged.logits()), seq

def on_disk():
    return [seq for seq, s in enumerate(paged.kv_pages().sequences) if s.pages_disk > 0]
"""

PRELUDE = (
    OPEN
    + """
plain, paged = contexts(512, kv_page_size=64, kv_budget="14MiB")
for seq in range(4):
    same(seq, list(range(seq, 250 + seq)))
assert paged.kv_pages().evicted_dirty > 0
"""
)

REFUSED = """
shim = ctypes.CDLL(None)

def refused(kind, error, text, call, after=0):
    shim.fault_arm(after, MANY, kind)
    try:
        call()
    except error as e:
        assert text in str(e) and "spill file" in str(e), e
    else:
        raise AssertionError("no error")
    assert shim.fault_count() > 0
    shim.fault_arm(0, 0, 0)
"""

REMOVED = (
    PRELUDE
    + """
shutil.rmtree(spill)
for token in range(3):
    for seq in range(4):
        same(seq, [token])
assert paged.kv_pages().restored > 0
print("exact")
"""
)

FAULTS = (
    PRELUDE
    + REFUSED
    + """
for round in range(3):
    gone = on_disk()[0]
    length = paged.seq_pos_max(gone)
    refused(EIO, superllama.DecodeError, "Input/output error", lambda: paged.decode([1], seq=gone))
    assert paged.seq_pos_max(gone) == length
    if round == 1:  # what was only read ahead is tried again where it is needed
        shim.fault_arm(0, MANY, EIO)
        paged.prefetch(gone)
        shim.fault_arm(0, 0, 0)
    for seq in (gone, *range(4)):
        same(seq, [1 + round])

# the state of a sequence on disk, whole and alone; what cannot be read is no state
gone = on_disk()[0]
for one in (None, gone):
    refused(EIO, superllama.StateError, "Input/output error", lambda: paged.state_save(one))
    assert paged.state_save(one)[-1000:] == plain.state_save(one)[-1000:]

# a full disk: what has to leave stays, and who needs its place is told
for seq in range(4):
    same(seq, [7])  # their last pages are in no file
gone = on_disk()[0]
refused(NOSPC, superllama.DecodeError, "No space left", lambda: paged.decode(list(range(200)), seq=gone))
for seq in range(4):
    same(seq, [9])

# a state that there is no space for; with space it can be loaded
state = plain.state_save()
refused(NOSPC, superllama.StateError, "No space left", lambda: paged.state_load(state))
for ctx in (plain, paged):
    ctx.clear()
for seq in range(4):
    same(seq, list(range(100)))
for ctx in (plain, paged):
    ctx.state_load(state)
for seq in range(4):
    same(seq, [11])
print("exact")
"""
)

# a recurrent state beside the pages cannot be taken back position by position
HYBRID = (
    OPEN
    + REFUSED
    + """
plain, paged = contexts(1024, kv_page_size=16, kv_budget=1500 << 10)
assert paged.kv_pages().reason == ""
for seq in range(4):
    same(seq, [i % 128 for i in range(seq, 250 + seq)])

# before the graph: a page does not come back
gone = on_disk()[0]
for _ in range(2):
    refused(EIO, superllama.DecodeError, "Input/output error", lambda: paged.decode([1], seq=gone))
for seq in (gone, *range(4)):
    same(seq, [1])

# in the middle of it: a sequence larger than the budget, read layer by layer
for i in range(6):
    same(0, list(range(i, 100 + i)))
streamed = paged.kv_pages().ubatches_streamed
assert streamed > 0
length = paged.seq_pos_max(0)
for after in (0, 20, 30):  # of 34 reads the first half comes before the graph runs
    refused(EIO, superllama.DecodeError, "Input/output error", lambda: paged.decode([1], seq=0), after)
    assert paged.seq_pos_max(0) == length
same(1, [3])  # its last page has to be written before it leaves
refused(NOSPC, superllama.DecodeError, "No space left", lambda: paged.decode(list(range(50)), seq=0))
assert paged.seq_pos_max(0) == length
assert paged.kv_pages().ubatches_streamed > streamed
for seq in (0, 0, *range(4)):
    same(seq, [2])
assert paged.state_save(0)[-1000:] == plain.state_save(0)[-1000:]
print("exact")
"""
)

ADDRESS_SPACE = """
import resource, sys
import superllama

model = superllama.Model(sys.argv[1])
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
try:
    superllama.Context(model, n_ctx=65536, paged_kv=True, flash_attn="on", kv_budget="64MiB")
except superllama.Error as e:
    print(e)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with superllama.Context(model, n_ctx=65536, paged_kv=True, flash_attn="on", kv_budget="64MiB") as ctx:
    ctx.decode([1])
print("alive")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_fails(demo_model: Path, tmp_path: Path, mode: str, fault_shim: Path, run_python: Runner) -> None:
    env = {**os.environ, "LD_PRELOAD": str(fault_shim), "FAULT_PATH": f"{tmp_path}/"}
    done = run_python(FAULTS, demo_model, tmp_path, mode, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_hybrid_model_on_a_disk_that_fails(
    architectures: dict[str, Path], tmp_path: Path, mode: str, fault_shim: Path, run_python: Runner
) -> None:
    env = {**os.environ, "LD_PRELOAD": str(fault_shim), "FAULT_PATH": f"{tmp_path}/"}
    done = run_python(HYBRID, architectures["falcon-h1-dense"], tmp_path, mode, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"


def test_a_spill_folder_that_is_removed(demo_model: Path, tmp_path: Path, run_python: Runner) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    done = run_python(REMOVED, demo_model, folder, "sync")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exact\n"


@pytest.mark.parametrize("folder", ["/proc", "/nowhere/at/all"])
def test_a_spill_folder_that_cannot_be_written(folder: str, tiny_model: Path) -> None:
    with (
        superllama.Model(tiny_model) as model,
        pytest.raises(superllama.Error, match=rf"spill file in {folder}.*spill_dir"),
    ):
        superllama.Context(model, paged_kv=True, flash_attn="on", spill_dir=folder)


def test_too_little_address_space(demo_model: Path, run_python: Runner) -> None:
    done = run_python(ADDRESS_SPACE, demo_model)
    assert done.returncode == 0, done.stderr
    error, last = done.stdout.splitlines()
    assert "cannot reserve" in error
    assert last == "alive"
