"""What a plan of several machines says, against RPC servers with little memory on this one: the same layers on the same
servers, and the same bytes there and over the connection."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rpc_devices import PRELUDE, limited_server
from running import Runner

from superllama import _plan_nodes, _plan_spec
from superllama._params import ContextParams, ModelParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")
CONTEXT = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1}

# Where layers are once a context is there and has computed, and the bytes of each that is on a device.
PLACED = (
    PRELUDE
    + """
superllama.add_rpc_server(sys.argv[4])
model, ctx = open_model()
ctx.decode([1, 2, 3])
layers = model.layers()
print(json.dumps({
    "devices": [layer.device or "" for layer in layers],
    "bytes": [layer.bytes if layer.device else 0 for layer in layers],
    "used": ctx.metrics().vram_own_bytes,
}))
"""
)


def planned(path: Path, totals: list[int]) -> Any:
    nodes = tuple(_plan_spec.Node(f"n{i}", total, 1e9, 1e-4) for i, total in enumerate(totals))
    (found,) = _plan_nodes.library_plan_nodes(path, ModelParams(), ContextParams(**CONTEXT), [(nodes, 1 << 40)])
    return found


@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.7, 0.2), (2.0, 0.0), (0.0, 0.6), (0.6, 2.0)])
def test_layers_are_where_the_plan_puts_them(
    shares: tuple[float, float], demo_model: Path, run_python: Runner, tmp_path: Path
) -> None:
    path = demo_model
    whole = planned(path, [1 << 30, 1 << 30]).shares[1]
    everything = whole.weight_bytes + whole.kv_bytes
    # of what is free 85 % are filled, and compute buffers come first
    totals = [int((everything * share + 1.5 * whole.compute_bytes) / 0.85) for share in shares]
    plan = planned(path, totals)
    with ExitStack() as stack:
        servers = []
        for i, total in enumerate(totals):
            (tmp_path / str(i)).mkdir()
            servers.append(stack.enter_context(limited_server(total, tmp_path / str(i))))
        first, second = servers
        done = run_python(PLACED, path, first.endpoint, first.serving_pid(), second.endpoint)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # devices are named in the order in which servers were added
    real = [{"RPC0": 0, "RPC1": 1, "": -1}[device] for device in seen["devices"]]
    assert real == [layer.node for layer in plan.layers]
    assert [b for b, node in zip(seen["bytes"], real, strict=True) if node >= 0] == [
        layer.weight_bytes for layer in plan.layers if layer.node >= 0
    ]
    there = sum(s.weight_bytes + s.kv_bytes + s.compute_bytes for s in plan.shares if s.n_layers)
    assert seen["used"] == pytest.approx(there, rel=0.02)
