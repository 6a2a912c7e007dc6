"""The device tier: the same results as a static -ngl, whatever moves; memory that really comes and goes.

The devices are RPC servers on this machine, and a GPU, where there is one or Mesa computes one (cards.py). Processes
that use them are not the tests' own: a server that goes away ends its client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cards import any_card, hide_cards
from native_build import run_native
from rpc_devices import PRELUDE, Server, rpc_server
from running import Runner

import superllama


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with rpc_server() as a, rpc_server() as b:
        yield [a, b]


@pytest.fixture(autouse=True)
def hidden_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cards(request, monkeypatch)


@dataclass
class Device:
    endpoint: str  # "gpu": the first one of this build
    pid: int  # of the server

    @property
    def flags(self) -> list[object]:
        return [] if self.endpoint == "gpu" else ["--rpc", self.endpoint]


@pytest.fixture(params=["rpc", "gpu"])
def device(request: pytest.FixtureRequest, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param == "rpc":
        return Device(servers[0].endpoint, servers[0].serving_pid())
    for name, value in any_card().items():
        monkeypatch.setenv(name, value)
    return Device("gpu", 0)


# ---------------------------------------------------------------- the same as a static placement


@pytest.mark.parametrize("repack", [0, 1])
@pytest.mark.parametrize("layers", [1, 12, 99])
def test_placement_at_load(layers: int, repack: int, demo_model: Path, device: Device) -> None:
    arguments = ["-m", demo_model, "-n", 8, "-t", 1, "-c", 256, "--repack", repack, "-ngl", layers, *device.flags]
    ours, stock = run_native("probe", *arguments, "--dynamic-layers"), run_native("probe-stock", *arguments)
    assert ours["tokens"] == stock["tokens"]
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["gpu_layers_active"] == min(layers - 1, 30)


@pytest.mark.parametrize("family", ["llama-dense", "qwen3moe-moe", "gemma3-dense", "mamba2-dense", "falcon-h1-dense"])
@pytest.mark.parametrize("layers", [2, 99])
def test_families(layers: int, family: str, architectures: dict[str, Path], device: Device) -> None:
    arguments = ["-m", architectures[family], "-n", 6, "-t", 1, "-c", 256, "--n-prompt", 20, "-ub", 16]
    arguments += ["-ngl", layers, *device.flags]
    ours, stock = run_native("probe", *arguments, "--dynamic-layers"), run_native("probe-stock", *arguments)
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["vram_own_bytes"] > 0


def test_two_devices_as_split(demo_model: Path, servers: list[Server]) -> None:
    """--tensor-split bounds each device: then both have what a static load gives them."""
    arguments = ["-m", demo_model, "-n", 8, "-t", 1, "-c", 256, "-ngl", 21, "-ts", 1, "-ts", 2]
    arguments += ["--rpc", servers[0].endpoint, "--rpc", servers[1].endpoint]
    ours, stock = run_native("probe", *arguments, "--dynamic-layers"), run_native("probe-stock", *arguments)
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["gpu_layers_active"] == 20


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("name", ["demo", "llama-dense", "qwen3moe-moe", "gemma3-dense", "falcon-h1-dense"])
def test_random_moves_change_no_logit(
    name: str, n_devices: int, demo_model: Path, architectures: dict[str, Path], servers: list[Server], device: Device
) -> None:
    """Two contexts, budgets at random, also from another thread; the program compares every step with the host."""
    model = demo_model if name == "demo" else architectures[name]
    endpoints = [] if device.endpoint == "gpu" else [server.endpoint for server in servers[:n_devices]]
    if device.endpoint == "gpu" and n_devices > 1:
        pytest.skip("one GPU")
    moves = 100 if device.endpoint == "gpu" else 300  # one that Mesa computes takes two seconds for each
    report = run_native("stress-devices", model, moves, 1, *endpoints)
    assert report["moves"] >= moves
    assert report["gpu_layers_max"] > report["gpu_layers_min"]


STATIC = (
    PRELUDE
    + """
def logits(model):
    ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
    ctx.decode(model.tokenize(PROMPT))
    rows = []
    for _ in range(8):
        rows.append(ctx.logits()[0].tobytes().hex())
        ctx.decode([int(ctx.logits()[0].argmax())])
    ctx.close()
    return rows

model, ctx = open_model()
full = ctx.metrics().vram_own_bytes
placed, same = [], []
for budget in [9 * full // 10, "auto", 3 * full // 4]:
    model.set_budget(vram=budget)
    greedy(ctx, 1) if placed else ctx.decode(model.tokenize(PROMPT))
    seen = logits(model)
    placed.append(on_device())
    static = superllama.Model(path, n_gpu_layers=placed[-1])
    same.append(seen == logits(static))
    static.close()
print(json.dumps({"placed": placed, "same": same}))
"""
)


def test_logits_after_moves_are_those_of_a_static_load(demo_model: Path, device: Device, run_python: Runner) -> None:
    done = run_python(STATIC, demo_model, device.endpoint, device.pid)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["same"] == [True] * 3
    assert 0 < seen["placed"][2] < seen["placed"][0] < seen["placed"][1] == 31


MEMORY = (
    PRELUDE
    + """
KV = 2 * 3 * 64 * 2 * 1024 # of a layer: K and V of three heads, 16 bits, 1024 cells; small ones stay with the allocator

def layer_bytes():
    return sum(l.bytes + (KV if l.index < model.n_layer else 0) for l in model.layers() if l.tier == "device")

model = superllama.Model(path, dynamic_layers=True)
ctx = superllama.Context(model, n_ctx=1024, n_ubatch=64, n_threads=1)
ctx.decode(model.tokenize(PROMPT))
samples, own = [resident()], [layer_bytes()]
for budget in [0, "auto", own[0] // 2, 0, "auto"]:
    model.set_budget(vram=budget)
    greedy(ctx, 2)
    samples.append(resident())
    own.append(layer_bytes())
print(json.dumps({"samples": samples, "own": own}))
"""
)


def test_memory_of_the_device(demo_model: Path, device: Device, run_python: Runner) -> None:
    with rpc_server() as fresh:  # the allocator of a server keeps some of what earlier tests freed
        if device.endpoint != "gpu":
            device = Device(fresh.endpoint, fresh.serving_pid())
        done = run_python(MEMORY, demo_model, device.endpoint, device.pid)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for before, after, own_before, own_after in zip(
        seen["samples"], seen["samples"][1:], seen["own"], seen["own"][1:], strict=False
    ):
        assert abs(own_after - own_before) > 20e6
        rounded = 31 * 2 * (2 << 20) if device.endpoint == "gpu" else 0  # up to whole pages of 2 MiB, by each buffer
        assert abs((after - before) - (own_after - own_before)) <= 0.1 * abs(own_after - own_before) + rounded


BUDGET = (
    PRELUDE
    + """
budget = 60 << 20
base, highest, done = resident(), 0, threading.Event()

def watch():
    global highest
    while not done.wait(0.001):
        highest = max(highest, resident() - base)

thread = threading.Thread(target=watch)
thread.start()
model, ctx = open_model(vram_budget=budget)
ctx.decode(model.tokenize(PROMPT))
greedy(ctx, 10)
layers = model.layers()
second = superllama.Context(model, n_ctx=1024, n_ubatch=32, n_threads=1) # more KV and compute buffers: layers make room
fewer = model.layers()
second.decode(model.tokenize(PROMPT))
own = ctx.metrics().vram_own_bytes
done.set()
thread.join()
print(json.dumps({"budget": budget, "highest": highest, "own": own,
                  "tiers": [l.tier for l in layers], "fewer": [l.tier for l in fewer],
                  "devices": sorted({str(l.device) for l in layers}), "bytes": [l.bytes for l in layers]}))
"""
)


def test_the_budget_is_not_exceeded(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    server = servers[0]
    done = run_python(BUDGET, demo_model, server.endpoint, server.serving_pid())
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert 0 < seen["own"] <= seen["budget"]
    # beside the buffers, a server holds the message that it is reading, 8 MiB at most, and its copy of the graph
    assert seen["highest"] <= seen["budget"] + (12 << 20)
    n = seen["tiers"].count("device")
    assert 2 < n < len(seen["tiers"])
    assert seen["tiers"] == ["host"] * (len(seen["tiers"]) - n) + ["device"] * n
    assert 0 < seen["fewer"].count("device") < n
    assert seen["devices"] == ["None", "RPC0"]


CUT = (
    PRELUDE
    + """
n = 6
def static(k):
    model = superllama.Model(path, n_gpu_layers=k)
    ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
    ctx.decode(model.tokenize(PROMPT))
    tokens = greedy(ctx, 3 * n)
    ctx.close(); model.close()
    return tokens

model, ctx = open_model(async_prefetch=True)
full = ctx.metrics().vram_own_bytes
ctx.decode(model.tokenize(PROMPT))
tokens, placed = [], []
for budget in ["auto", full // 2, "auto"]:
    model.set_budget(vram=budget)
    tokens += greedy(ctx, n)
    placed.append([l.tier for l in model.layers()].count("device"))
    assert budget == "auto" or ctx.metrics().vram_own_bytes <= budget
moves = [(l.device_loads, l.device_evictions) for l in model.layers()]
ctx.close(); model.close()
print(json.dumps({"tokens": tokens, "placed": placed, "moves": moves, "static": [static(k) for k in set(placed)]}))
"""
)


def test_tokens_are_those_of_a_static_placement(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    """Repacked weights on the host, before, during and after a cut of the budget in half."""
    done = run_python(CUT, demo_model, servers[0].endpoint, servers[0].serving_pid())
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["placed"][0] == seen["placed"][2] == 31
    assert 2 < seen["placed"][1] < 30
    assert {tuple(m) for m in seen["moves"]} == {(1, 0), (2, 1)}
    if any(tokens != seen["static"][0] for tokens in seen["static"]):
        pytest.skip("on this CPU the kernels of the host and those of the server choose other tokens")
    assert seen["tokens"] == seen["static"][0]


PAGED = (
    PRELUDE
    + """
N = 1000 # tokens, more than a cache has memory for from the beginning
def open_context(model, **kwargs):
    return superllama.Context(model, n_ctx=8192, n_seq_max=4, kv_unified=True, n_ubatch=128, n_threads=1,
                              flash_attn="on", **kwargs)

def run(**kwargs):
    model = superllama.Model(path, dynamic_layers=True, use_extra_bufts=False)
    if kwargs:
        with open_context(model, **kwargs) as ctx: # half of the tokens, and what reads and writes them
            kwargs["kv_budget"] = ctx.kv_pages().page_bytes * N // 64 // 2 + (1 << 20)
    ctx = open_context(model, **kwargs)
    own, rows, placed = [ctx.metrics().vram_own_bytes], [], []
    text = (model.tokenize(PROMPT) * N)[:N]
    def say(tokens, seq):
        ctx.decode(tokens, seq=seq)
        rows.append(ctx.logits()[0].tobytes().hex())
    for seq in (0, 1, 2):
        say(text if seq == 1 else text[:40], seq)
        own.append(ctx.metrics().vram_own_bytes)
    state = ctx.state_save(1)
    for budget in (0, "auto"): # to pages, of which some are on disk, and back
        model.set_budget(vram=budget)
        say([seq + 5 for seq in range(4)], 0)
        placed.append([l.tier for l in model.layers()].count("device"))
    ctx.seq_remove(1)
    ctx.seq_remove(2)
    ctx.seq_remove(0, 40) # what came last, behind the others' cells
    say([7], 0)
    own.append(ctx.metrics().vram_own_bytes)
    ctx.state_load(state, 1)
    say([8], 1)
    own.append(ctx.metrics().vram_own_bytes)
    pages = ctx.kv_pages()
    ctx.close(); model.close()
    return {"own": own, "rows": rows, "placed": placed, "pages": vars(pages) | {"sequences": []},
            "n_layer": model.n_layer}

print(json.dumps([run(), run(paged_kv=True, kv_page_size=64)]))
"""
)


def test_paged_kv_on_a_device_grows_with_its_cells(
    architectures: dict[str, Path], device: Device, run_python: Runner
) -> None:
    """The same logits as of a cache that is there as a whole, while budgets move layers, and a state is loaded."""
    done = run_python(PAGED, architectures["qwen3moe-moe"], device.endpoint, device.pid)
    assert done.returncode == 0, done.stderr
    whole, grown = json.loads(done.stdout)
    assert grown["pages"]["paged"]
    assert grown["pages"]["bytes_written"] > 0
    assert whole["placed"] == grown["placed"] == [0, whole["n_layer"] + 1]
    assert grown["rows"] == whole["rows"]
    first, few, many, same, fewer, again = grown["own"]
    assert first == few < many <= same
    assert whole["own"][0] - first > 5 * (many - first)
    assert fewer < same
    assert fewer < again


# ---------------------------------------------------------------- what the user placed

PINNED = (
    PRELUDE
    + """
import numpy as np
pattern = sys.argv[4]
def rows_of(ctx):
    ctx.decode(list(range(1, 60))) # a large batch: what is on the host is computed on a device
    rows = [ctx.logits()[0].tobytes().hex()]
    ctx.decode([7])
    return rows + [ctx.logits()[0].tobytes().hex()]
def logits(**kwargs):
    model = superllama.Model(path, override_tensor={pattern: "CPU"} if pattern else {}, **kwargs)
    ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
    return model, ctx, rows_of(ctx)

model, ctx, ours = logits(dynamic_layers=True)
bytes_there = [l.bytes for l in model.layers()]
tiers = [l.tier for l in model.layers()]
for budget in [ctx.metrics().vram_own_bytes // 2, "auto"]:
    model.set_budget(vram=budget)
    ctx.decode([9])
ctx.close()
ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1) # what was computed meanwhile, other kernels did
ours += rows_of(ctx)
ctx.close(); model.close()
static, ctx, stock = logits(n_gpu_layers=999)
stock *= 2
print(json.dumps({"same": ours == stock, "bytes": bytes_there, "tiers": tiers}))
"""
)


@pytest.mark.parametrize(
    ("family", "pattern", "share"),
    [
        ("qwen3moe-moe", "exps", 0.9),
        ("llama-dense", "ffn_down", 0.9),
        ("llama-dense", "blk\\.1\\.", 1.0),
        ("llama-dense", "attn_k", 0.999),
    ],
)
def test_tensors_pinned_to_the_host(
    family: str, pattern: str, share: float, architectures: dict[str, Path], device: Device, run_python: Runner
) -> None:
    """The rest of a layer goes to the device, as in a static load with the same --override-tensor."""
    everything, pinned = [], []
    for rest, into in (("", everything), (pattern, pinned)):
        done = run_python(PINNED, architectures[family], device.endpoint, device.pid, rest)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["same"]
        assert set(seen["tiers"]) == {"device"}
        into += seen["bytes"]
    assert sum(pinned) < share * sum(everything)
    if pattern.startswith("blk"):
        assert pinned[1] == 0 < pinned[0]
    else:
        assert all(a > b > 0 for a, b in zip(everything[:-1], pinned[:-1], strict=True))


def test_tensors_pinned_to_a_device_are_refused(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    script = PRELUDE + "open_model(override_tensor={'ffn_up': f'RPC0[{endpoint}]'})"
    done = run_python(script, demo_model, servers[0].endpoint, servers[0].serving_pid())
    assert done.returncode != 0
    assert "pinned to the host only" in done.stderr


# ---------------------------------------------------------------- errors


def test_bad_input(demo_model: Path, demo: superllama.Model) -> None:
    with pytest.raises(superllama.ModelError, match="without dynamic layers"):
        demo.set_budget(vram="1GiB")
    for wrong in ("50%", "8 parsecs", "", "1GiB,", [1.5], [], ",".join(["1GiB"] * 17)):
        with pytest.raises(ValueError, match="size"):
            superllama.ModelParams(vram_budget=wrong)
    assert superllama.ModelParams(vram_budget=["1GiB", 0, "auto"]).vram_budget == ("1GiB", 0, "auto")


# ---------------------------------------------------------------- what the metrics say of each device

COUNTED = (
    PRELUDE
    + """
from superllama._native import ffi, lib
superllama.add_rpc_server(sys.argv[4])
model, ctx = open_model(vram_budget=[0, 0])
ctx.decode(ctx.model.tokenize(PROMPT))
shown = [ctx.metrics()]
for budget in (["60MiB", "60MiB"], [0, 0]):
    model.set_budget(vram=budget)
    ctx.decode([1])
    shown.append(ctx.metrics())
entries = ffi.new("struct superllama_device[]", 3)
assert lib.superllama_devices(model._c, ffi.NULL, 0) == lib.superllama_devices(model._c, entries, 1) == 2
assert entries[1].name == ffi.NULL # no more than there is room for
lib.superllama_devices(model._c, entries, 3)
for entry, told in zip(entries, shown[-1].devices):
    assert ffi.string(entry.name).decode() == told.device
    assert (entry.bytes, entry.budget_bytes) == (told.bytes, told.budget_bytes)
    assert (entry.bytes_up, entry.bytes_down) == (told.bytes_up, told.bytes_down)
print(json.dumps([json.loads(metrics.model_dump_json()) for metrics in shown]))
"""
)


def test_counters_of_each_device(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    a, b = servers
    done = run_python(COUNTED, demo_model, a.endpoint, a.serving_pid(), b.endpoint)
    assert done.returncode == 0, done.stderr
    before, moved, back = json.loads(done.stdout)
    assert len({device["device"] for device in moved["devices"]}) == 2
    for metrics in (before, moved, back):
        assert sum(device["bytes"] for device in metrics["devices"]) == metrics["vram_own_bytes"]
        assert sum(device["budget_bytes"] for device in metrics["devices"]) == metrics["vram_budget_bytes"]
    for at_first, there, gone in zip(before["devices"], moved["devices"], back["devices"], strict=True):
        assert there["bytes"] > at_first["bytes"] and there["bytes"] > gone["bytes"]
        # weights go there, and KV both ways
        up = there["bytes_up"] - at_first["bytes_up"]
        assert up > gone["bytes_down"] - there["bytes_down"] > 0
        assert gone["bytes_up"] == there["bytes_up"]
        assert there["bytes_down"] >= at_first["bytes_down"]  # buffers for computing may have sent a layer back
