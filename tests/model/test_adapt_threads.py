"""Fewer threads compute while another process keeps a core busy, and no bit changes by it.

The test's child runs on two cores, and a busy process is bound to one of them: whatever else the machine does, two
threads have no core each. When they get it back is the rule's matter: tests/native/test-telemetry.cpp.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from running import Runner

pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
    ),
    pytest.mark.skipif(
        not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell how long threads wait for a core"
    ),
]

# argv: a model, adapt_threads, "managed" or "stock", tokens of the prompt, for how many threads to wait
PROGRAM = """
import os, subprocess, sys, time
path, mode, managed, n_prompt, wanted = sys.argv[1], sys.argv[2], sys.argv[3] == "managed", *map(int, sys.argv[4:6])
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import superllama

def computed(ctx):
    ctx.seq_remove(0)
    ctx.decode([1 + i % 50 for i in range(n_prompt)])
    ctx.decode([2])
    return ctx.logits().tobytes()

model = superllama.Model(path, dynamic_layers=managed, use_extra_bufts=False)
with superllama.Context(model, n_ctx=1024, n_threads=2, adapt_threads=mode, flash_attn="on") as ctx:
    alone = computed(ctx)
    loop = f"import os; os.sched_setaffinity(0, [{cores[0]}])\\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", loop])
    try:
        begin = time.monotonic()
        same, seconds = True, 60 if wanted == 1 else 2
        while time.monotonic() - begin < seconds and not (wanted == 1 and ctx.metrics().threads == 1):
            same = same and computed(ctx) == alone
        same = same and computed(ctx) == alone
        print(ctx.metrics().threads, same, ctx.metrics().core_wait_ms > 0)
    finally:
        busy.kill()
        busy.wait()
"""

SHORT, LONG = 40, 600  # from 512 cells on, upstream's attention shares those of a single token among its threads


def run(run_python: Runner, *args: object) -> tuple[int, bool, bool]:
    done = run_python(PROGRAM, *args)
    assert done.returncode == 0, done.stderr
    threads, same, waited = str(done.stdout).split()
    return int(threads), same == "True", waited == "True"


def test_fewer_threads_and_the_same_logits(tiny_model: Path, run_python: Runner) -> None:
    assert run(run_python, tiny_model, "exact", "managed", SHORT, 1) == (1, True, True)


def test_all_threads_where_a_bit_depends_on_them(tiny_model: Path, run_python: Runner) -> None:
    assert run(run_python, tiny_model, "exact", "managed", LONG, 2) == (2, True, True)


def test_fewer_threads_whatever_depends_on_them(tiny_model: Path, run_python: Runner) -> None:
    threads, _, waited = run(run_python, tiny_model, "on", "stock", LONG, 1)
    assert (threads, waited) == (1, True)


@pytest.mark.parametrize(("mode", "weights"), [("exact", "stock"), ("off", "managed"), ("off", "stock")])
def test_all_threads_where_it_is_not_asked_for(tiny_model: Path, run_python: Runner, mode: str, weights: str) -> None:
    threads, same, waited = run(run_python, tiny_model, mode, weights, SHORT, 2)
    assert (threads, same, waited) == (2, True, weights == "managed")
