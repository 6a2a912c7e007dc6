"""What a client makes of the machines that lend: their free memory, and the way to them."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench import cgroup
from bench.counting import Counter
from bench.undo import Journal
from rpc_devices import PRELUDE, rpc_server
from running import Runner

import superllama
from superllama._programs import find_program

pytestmark = pytest.mark.usefixtures("no_gpu")


class Far(Counter):
    """Every answer is on its way for a while."""

    def allowed(self, data: bytes) -> bytes:
        time.sleep(0.02)
        return data


PLACES = """
import json, sys
import superllama
path, near, far, budget = sys.argv[1:]
for endpoint in (near, far): # alike, the last one is filled first
    superllama.add_rpc_server(endpoint)
model = superllama.Model(path, dynamic_layers=True, vram_budget=budget)
ctx = superllama.Context(model, n_ctx=256, n_ubatch=32, n_threads=1)
ctx.decode([1, 2, 3])
layers = [layer.device for layer in model.layers()]
names = [device.name for device in superllama.devices() if device.kind == "gpu"]
print(json.dumps([names, layers, ctx.metrics().vram_own_bytes, ctx.logits()[0].tolist()]))
"""


def test_a_far_device_has_what_no_near_one_has_room_for(demo_model: Path, run_python: Runner) -> None:
    def places(near: str, far: str, budget: str) -> tuple[list[str], list[str | None], int, list[float]]:
        done = run_python(PLACES, demo_model, near, far, budget)
        assert done.returncode == 0, done.stderr
        names, layers, own, logits = json.loads(done.stdout)
        return names, layers, own, logits

    with rpc_server() as a, rpc_server() as b, Far(b.endpoint) as far:
        (near, away), layers, own, logits = places(a.endpoint, far.endpoint, "1GiB")
        assert set(layers) == {near}

        _, layers, _, same = places(a.endpoint, far.endpoint, f"{own * 3 // 4},1GiB")
        assert 0 < layers.count(away) < layers.count(near) == len(layers) - layers.count(away)
        assert same == logits


FREE = """
import json, sys
import superllama
superllama.add_rpc_server(sys.argv[1])
(device,) = [d for d in superllama.devices() if d.kind == "gpu"]
print(json.dumps([device.memory_free, device.memory_total]))
"""


def test_a_server_says_what_is_free_on_its_machine(run_python: Runner) -> None:
    with rpc_server() as server:
        done = run_python(FREE, server.endpoint)
    assert done.returncode == 0, done.stderr
    free, total = json.loads(done.stdout)
    here: Any = superllama.memory()
    assert total == here.host_total
    assert 0 < free < total
    assert free == pytest.approx(here.host_available, abs=total / 4)  # others use the machine meanwhile


LIMIT = 400 << 20  # of a server's container, in which the demo model takes some 100 MiB
TAKE = "import sys; sys.stdin.readline(); taken = b'x' * (260 << 20); print(flush=True); sys.stdin.readline()"

FOLLOW = (
    PRELUDE
    + """
model, ctx = open_model()
ctx.decode(model.tokenize(PROMPT))
for line in sys.stdin:
    for _ in range(4):
        time.sleep(0.11) # devices are sampled at most every 100 ms
        greedy(ctx, 1)
    print(on_device(), len(model.layers()), flush=True)
"""
)


def test_layers_leave_a_container_that_is_full(demo_model: Path, tmp_path: Path) -> None:
    """And come back."""
    if cgroup.find_root() is None:
        pytest.skip(cgroup.why_not())
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(cgroup.group(stack.enter_context(Journal()), LIMIT))
        inside = tmp_path / "inside"
        inside.write_text(
            f'#!/bin/sh\necho $$ >{group.path}/cgroup.procs\nexec {find_program("ggml-rpc-server")} "$@"\n'
        )
        inside.chmod(0o755)
        server = stack.enter_context(rpc_server(program=inside))
        start = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        client = start([sys.executable, "-c", FOLLOW, demo_model, server.endpoint, str(server.serving_pid())])
        stack.enter_context(client)

        def n_there() -> list[int]:
            print(file=client.stdin, flush=True)
            return [int(n) for n in client.stdout.readline().split()]

        before, n_layers = n_there()
        assert before == n_layers
        with start([sys.executable, "-c", TAKE]) as other:
            group.take(other.pid)
            print(file=other.stdin, flush=True)  # only now: what it had taken before would be charged elsewhere
            other.stdout.readline()
            assert n_there()[0] < n_layers
            print(file=other.stdin, flush=True)
        assert n_there()[0] == n_layers
        client.stdin.close()
        assert client.wait() == 0
