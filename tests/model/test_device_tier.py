"""The device tier: the same results as a static -ngl, whatever moves; memory that really comes and goes.

The devices are RPC servers on this machine. Processes that use them are not the tests' own: a server that goes away
ends its client.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_build import native_programs
from rpc_devices import Server, rpc_server
from running import Runner

import superllama
from superllama._programs import find_program


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with rpc_server() as a, rpc_server() as b:
        yield [a, b]


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("random")
    command = [native_programs() / "make-arch-models", "-o", f"{folder}/"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return {path.stem: path for path in folder.glob("*.gguf")}


def run(program: str, *arguments: object) -> dict[str, Any]:
    command = [native_programs() / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# ---------------------------------------------------------------- the same as a static placement


@pytest.mark.parametrize("repack", [0, 1])
@pytest.mark.parametrize("layers", [1, 12, 99])
def test_placement_at_load(layers: int, repack: int, demo_model: Path, servers: list[Server]) -> None:
    arguments = ["-m", demo_model, "-n", 8, "-t", 1, "-c", 256, "--repack", repack]
    arguments += ["--rpc", servers[0].endpoint, "-ngl", layers]
    ours, stock = run("probe", *arguments, "--dynamic-layers"), run("probe-stock", *arguments)
    assert ours["tokens"] == stock["tokens"]
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["gpu_layers_active"] == min(layers - 1, 30)


@pytest.mark.parametrize("family", ["llama-dense", "qwen3moe-moe", "gemma3-dense", "mamba2-dense", "falcon-h1-dense"])
@pytest.mark.parametrize("layers", [2, 99])
def test_families(layers: int, family: str, random_models: dict[str, Path], servers: list[Server]) -> None:
    arguments = ["-m", random_models[family], "-n", 6, "-t", 1, "-c", 256, "--n-prompt", 20, "-ub", 16]
    arguments += ["--rpc", servers[0].endpoint, "-ngl", layers]
    ours, stock = run("probe", *arguments, "--dynamic-layers"), run("probe-stock", *arguments)
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["vram_own_bytes"] > 0


def test_two_devices_as_split(demo_model: Path, servers: list[Server]) -> None:
    """--tensor-split bounds each device: then both have what a static load gives them."""
    arguments = ["-m", demo_model, "-n", 8, "-t", 1, "-c", 256, "-ngl", 21, "-ts", 1, "-ts", 2]
    arguments += ["--rpc", servers[0].endpoint, "--rpc", servers[1].endpoint]
    ours, stock = run("probe", *arguments, "--dynamic-layers"), run("probe-stock", *arguments)
    assert ours["hash"] == stock["hash"]
    assert ours["metrics"]["gpu_layers_active"] == 20


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("name", ["demo", "llama-dense", "qwen3moe-moe"])
def test_random_moves_change_no_logit(
    name: str, n_devices: int, demo_model: Path, random_models: dict[str, Path], servers: list[Server]
) -> None:
    """Two contexts, budgets at random, also from another thread; the program compares every step with the host."""
    model = demo_model if name == "demo" else random_models[name]
    report = run("stress-devices", model, 300, 1, *[server.endpoint for server in servers[:n_devices]])
    assert report["moves"] >= 300
    assert report["gpu_layers_max"] > report["gpu_layers_min"]


PRELUDE = """
import json, os, sys, threading, time
import superllama

path, endpoint, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
superllama.add_rpc_server(endpoint)
PROMPT = "The capital of France is Paris. The capital of Italy is"

def resident():
    fields = open(f"/proc/{pid}/statm").read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")

def open_model(**kwargs):
    model = superllama.Model(path, dynamic_layers=True, **kwargs)
    return model, superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)

def greedy(ctx, n):
    tokens = []
    for _ in range(n):
        tokens.append(int(ctx.logits()[0].argmax()))
        ctx.decode([tokens[-1]])
    return tokens
"""

MEMORY = (
    PRELUDE
    + """
KV = 2 * 3 * 64 * 2 * 256  # of a layer: K and V of three heads, 16 bits, 256 cells

def layer_bytes():
    return sum(l.bytes + (KV if l.index < model.n_layer else 0) for l in model.layers() if l.tier == "device")

model, ctx = open_model()
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


def test_memory_of_the_server(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    server = servers[0]
    done = run_python(MEMORY, demo_model, server.endpoint, server.process.pid)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for before, after, own_before, own_after in zip(
        seen["samples"], seen["samples"][1:], seen["own"], seen["own"][1:], strict=False
    ):
        assert abs(own_after - own_before) > 20e6
        assert after - before == pytest.approx(own_after - own_before, rel=0.1)


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
    done = run_python(BUDGET, demo_model, server.endpoint, server.process.pid)
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
    done = run_python(CUT, demo_model, servers[0].endpoint, servers[0].process.pid)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["placed"][0] == seen["placed"][2] == 31
    assert 2 < seen["placed"][1] < 30
    assert all(tokens == seen["tokens"] for tokens in seen["static"])
    assert {tuple(m) for m in seen["moves"]} == {(1, 0), (2, 1)}


# ---------------------------------------------------------------- errors

LOST = (
    PRELUDE
    + """
import signal, subprocess

port = sys.argv[4].rpartition(":")[2]
superllama.add_rpc_server(sys.argv[4])
model, ctx = open_model(vram_budget=["50MiB", "auto"])
healthy = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
healthy.decode(model.tokenize(PROMPT))
reference = greedy(healthy, 8)
on_both = {l.device for l in model.layers()} >= {"RPC1"}
ctx.decode(model.tokenize(PROMPT))
os.kill(int(sys.argv[5]), signal.SIGKILL)
errors = []
for _ in range(2):
    try:
        ctx.decode([1])
    except superllama.DecodeError as e:
        errors.append(str(e))
gone = "RPC1" in {l.device for l in model.layers()}
again = subprocess.Popen([sys.argv[6], "-H", "127.0.0.1", "-p", port, "-t", "1"], stdout=subprocess.DEVNULL)
time.sleep(1)
ctx.close(); healthy.close()
fresh = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
fresh.decode(model.tokenize(PROMPT))
tokens = greedy(fresh, 4)
model.set_budget(vram=["50MiB", "auto"])
tokens += greedy(fresh, 4)
back = "RPC1" in {l.device for l in model.layers()}
fresh.close(); model.close()
again.kill()
print(json.dumps({"both": on_both, "errors": errors, "gone": gone, "back": back, "same": tokens == reference}))
"""
)


def test_a_server_that_is_killed(demo_model: Path, servers: list[Server], run_python: Runner) -> None:
    """Its contexts fail with a message; its layers are back on the host, and on it, when it is there again."""
    with rpc_server() as victim:
        done = run_python(
            LOST,
            demo_model,
            servers[0].endpoint,
            servers[0].process.pid,
            victim.endpoint,
            victim.process.pid,
            find_program("ggml-rpc-server"),
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["both"]
    assert len(seen["errors"]) == 2
    assert all(f"RPC server at {victim.endpoint} is gone" in error for error in seen["errors"])
    assert not seen["gone"]
    assert seen["back"]
    assert seen["same"]


def test_bad_input(demo_model: Path, demo: superllama.Model) -> None:
    with pytest.raises(superllama.ModelError, match="without dynamic layers"):
        demo.set_budget(vram="1GiB")
    for wrong in ("50%", "8 parsecs", "", "1GiB,", [1.5], [], ",".join(["1GiB"] * 17)):
        with pytest.raises(ValueError, match="size"):
            superllama.ModelParams(vram_budget=wrong)
    assert superllama.ModelParams(vram_budget=["1GiB", 0, "auto"]).vram_budget == ("1GiB", 0, "auto")


def test_no_server() -> None:
    with pytest.raises(superllama.Error, match="no RPC server at 'localhost:1'"):
        superllama.add_rpc_server("localhost:1")
    with pytest.raises(superllama.Error, match="host:port"):
        superllama.add_rpc_server("nowhere")
