"""The device tier where memory on a device, or on the host, is short: what others take, and what a budget leaves.

The devices are RPC servers on this machine with as much memory as a test gives them, and cards that Mesa computes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench import make_model
from cards import computed_card, hide_cards
from rpc_devices import PRELUDE, limited_server, rpc_server
from running import Runner


@pytest.fixture(autouse=True)
def hidden_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cards(request, monkeypatch)


class Limited:
    """Runs scripts beside a device of little memory."""

    def __init__(self, kind: str, run_python: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self._run_python, self._folder, self._monkeypatch = kind, run_python, folder, monkeypatch

    def run(self, script: str, path: Path, total: int, *more: object) -> Any:
        """What the script prints; its device has `total` bytes."""
        if self.kind == "rpc":
            with limited_server(total, self._folder) as server:
                return self._run(script, path, server.endpoint, server.serving_pid(), server.taken, total, *more)
        taken = self._folder / "taken"
        taken.write_text("0")
        for name, value in computed_card(total, taken).items():
            self._monkeypatch.setenv(name, value)
        return self._run(script, path, "gpu", 0, taken, total, *more)

    def _run(self, script: str, *arguments: object) -> Any:
        done = self._run_python(script, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(params=["rpc", "card"])
def limited(
    request: pytest.FixtureRequest, run_python: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Limited:
    return Limited(request.param, run_python, tmp_path, monkeypatch)


PRESSURE = (
    PRELUDE
    + """
taken_file, total = sys.argv[4], int(sys.argv[5])
HIGH, LOW = 0.8, 0.7
model, ctx = open_model(mem_pressure=HIGH, mem_pressure_low=LOW)
ctx.decode(model.tokenize(PROMPT))

def step():
    time.sleep(0.11) # devices are sampled at most every 100 ms
    before = [(l.device_loads, l.device_evictions) for l in model.layers()]
    greedy(ctx, 1)
    after = [(l.device_loads, l.device_evictions) for l in model.layers()]
    loads, evictions = (sum(b[i] - a[i] for a, b in zip(before, after)) for i in (0, 1))
    return {"layers": on_device(), "loads": loads, "evictions": evictions, "own": ctx.metrics().vram_own_bytes}

def phase(taken):
    with open(taken_file, "w") as file:
        file.write(str(int(taken)))
    return [step() for _ in range(4)]

full = step()["own"]
others = {
    "none": 0,
    "much": HIGH * total - full / 2,    # half of what we have is to go
    "less": (HIGH - 0.05) * total - full / 2, # between the marks
    "little": (LOW - 0.02) * total - full / 2, # below the low one
    "back": 0,
}
print(json.dumps({"full": full, "taken": others, "phases": {name: phase(taken) for name, taken in others.items()}}))
"""
)


def test_layers_follow_the_memory_that_is_there(demo_model: Path, limited: Limited) -> None:
    """No call of ours: the server's device tells that another program has taken memory, and given it back."""
    total = 300_000_000  # of which the model takes 115
    seen = limited.run(PRESSURE, demo_model, total)
    phases = seen["phases"]
    assert all(step["loads"] == 0 or step["evictions"] == 0 for steps in phases.values() for step in steps)
    still = {"layers": 31, "loads": 0, "evictions": 0, "own": seen["full"]}
    assert phases["none"] == [still] * 4

    much = phases["much"]
    assert much[0]["evictions"] > 5  # within one ubatch, all at once
    assert 0 < much[0]["own"] <= 0.8 * total - seen["taken"]["much"]
    assert much[1:] == [{**much[0], "evictions": 0}] * 3
    assert phases["less"] == [much[1]] * 4

    little = phases["little"]
    assert little[0]["loads"] > 0
    assert little[0]["layers"] < 31
    assert little[0]["own"] <= 0.8 * total - seen["taken"]["little"]
    assert sum(step["evictions"] for step in little) == 0
    assert phases["back"][-1]["layers"] == 31
    assert phases["back"][-1]["own"] == seen["full"]


BESIDE = (
    PRELUDE
    + """
taken_file, total = sys.argv[4], int(sys.argv[5])
def take(n):
    with open(taken_file, "w") as file:
        file.write(str(int(n)))
    time.sleep(0.11) # devices are sampled at most every 100 ms

def step():
    tokens.extend(greedy(ctx, 1))
    placed.append(on_device())

kwargs = {"use_extra_bufts": False, "async_prefetch": True, "mem_pressure": 0.8, "mem_pressure_low": 0.7}
model, ctx = open_model(**kwargs)
tokens, placed = [], [on_device()]
ctx.decode(model.tokenize(PROMPT))
for _ in range(2):
    take(0.8 * total - ctx.metrics().vram_own_bytes / 2)
    step()
    take(0)
    for _ in range(40): # a token each: what comes does so meanwhile
        step()
        time.sleep(0.01)
take(0.8 * total - ctx.metrics().vram_own_bytes / 2)
step()
take(0)
step()
ctx.close(); model.close() # with layers on their way

model = superllama.Model(path, use_extra_bufts=False, n_gpu_layers=0)
ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
ctx.decode(model.tokenize(PROMPT))
print(json.dumps({"placed": placed, "same": greedy(ctx, len(tokens)) == tokens}))
"""
)


def test_layers_come_back_beside_the_computation(demo_model: Path, limited: Limited) -> None:
    """With --async-prefetch no token waits for an upload: the first ones after memory is back use what is there."""
    total = 300_000_000
    seen = limited.run(BESIDE, demo_model, total)
    assert seen["same"] or limited.kind == "card"  # whose kernels may choose other tokens than the host's
    full, *placed = seen["placed"]
    assert full == 31
    for first in (0, 41):
        few, waiting, *later = placed[first : first + 41]
        assert 0 < few < 25
        assert waiting == few
        assert later[-1] == full
        assert set(later) <= {few, full}  # all at once, at the next token or after more of them
    assert placed[-1] == placed[-2] < 25


FULL = (
    PRELUDE
    + """
taken_file, total = sys.argv[4], int(sys.argv[5])
def open_here(**kwargs): # nothing moves for a mark; the budget is more than there is
    return open_model(vram_budget="1GiB", mem_pressure=1.0, mem_pressure_low=0.0, **kwargs)

def take_rest(own):
    with open(taken_file, "w") as file:
        file.write(str(total - own))

# more than fits: what the device refuses stays on the host
model, ctx = open_here()
placed = [on_device()]
ctx.decode(model.tokenize(PROMPT))
tokens = greedy(ctx, 4)

# nothing is free any more, and another context comes
take_rest(ctx.metrics().vram_own_bytes)
second = superllama.Context(model, n_ctx=1024, n_ubatch=64, n_threads=1)
placed.append(on_device())
second.decode(model.tokenize(PROMPT))
tokens += greedy(ctx, 4)
same = greedy(second, 8) == tokens
third = superllama.Context(model, n_ctx=256, n_ubatch=256, n_threads=1) # larger compute buffers
third.decode(model.tokenize(PROMPT) * 6)
placed.append(on_device())
third.close(); second.close(); ctx.close(); model.close()
with open(taken_file, "w") as file:
    file.write("0")
print(json.dumps({"placed": placed, "same": same}))
"""
)


def test_a_full_device_makes_room(demo_model: Path, limited: Limited) -> None:
    """Its allocations fail, as on a card: layers leave for the KV and compute buffers of a context, and go on."""
    total = 70_000_000
    seen = limited.run(FULL, demo_model, total)
    assert seen["same"]
    assert 31 > seen["placed"][0] > seen["placed"][1] > seen["placed"][2] >= 0


ONE_FULL = (
    PRELUDE
    + """
taken_file, total, roomy = sys.argv[4], int(sys.argv[5]), sys.argv[6]
superllama.add_rpc_server(roomy)
def placed():
    return [sum(l.device == name for l in model.layers()) for name in ("RPC0", "RPC1")]

model, ctx = open_model(vram_budget=["1GiB", "1GiB"], mem_pressure=1.0, mem_pressure_low=0.0, tensor_split=[0.5, 0.5])
seen = [placed()]
with open(taken_file, "w") as file:
    file.write(str(total - ctx.metrics().vram_own_bytes // 4)) # less than RPC0 has
second = superllama.Context(model, n_ctx=512, n_ubatch=256, n_threads=1) # larger compute buffers
second.decode(model.tokenize(PROMPT) * 6)
seen.append(placed())
second.close(); ctx.close(); model.close()
print(json.dumps(seen))
"""
)


@pytest.mark.parametrize("limited", ["rpc"], indirect=True)
def test_layers_leave_the_device_that_is_full(demo_model: Path, limited: Limited) -> None:
    total = 150_000_000
    with rpc_server() as roomy:
        before, after = limited.run(ONE_FULL, demo_model, total, roomy.endpoint)
    assert min(before) > 10
    assert after[0] < before[0]
    assert after[1] == before[1]


TIGHT = (
    PRELUDE
    + r"""
taken_file, total = sys.argv[4], int(sys.argv[5])
kwargs = {"mem_pressure": 1.0, "mem_pressure_low": 0.0, "use_extra_bufts": False}
errors = []
def least(**more): # in MiB, with a context
    mib = 1
    while True:
        try:
            model = superllama.Model(path, dynamic_layers=True, mem_budget=f"{mib}MiB", **kwargs, **more)
            with model:
                superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1).close()
            return mib
        except superllama.Error as e:
            mib = max(mib, int(re.search(r"least that works is (\d+) MiB", str(e))[1])) + 1

def take_rest():
    # a card's backend has pools of its own beside what is counted
    used = resident() if endpoint == "gpu" else ctx.metrics().vram_own_bytes
    with open(taken_file, "w") as file:
        file.write(str(total - used))

def fails(what):
    try:
        what()
    except superllama.Error as e:
        errors.append(str(e))

host, both = least(vram_budget=0), least(vram_budget="1GiB")

# what is on the device needs no room on the host
model, ctx = open_model(vram_budget="1GiB", mem_budget=f"{both}MiB", **kwargs)
ctx.decode(model.tokenize(PROMPT))
tokens = greedy(ctx, 4)
placed = [on_device()]
fails(lambda: model.set_budget(vram=0)) # the host has no room for them all
placed.append(on_device())
tokens += greedy(ctx, 4)
take_rest()
fails(lambda: superllama.Context(model, n_ctx=4096, n_ubatch=64, n_threads=1)) # no room anywhere
placed.append(on_device())
tokens += greedy(ctx, 4)
model.set_budget(mem_budget=f"{host}MiB", vram=0)
placed.append(on_device())
tokens += greedy(ctx, 4)
ctx.close(); model.close()

model = superllama.Model(path, use_extra_bufts=False)
ctx = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
ctx.decode(model.tokenize(PROMPT))
same = greedy(ctx, 16) == tokens
print(json.dumps({"errors": errors, "host": host, "both": both, "placed": placed, "same": same}))
"""
)


def test_the_host_budget_with_layers_on_a_device(demo_model: Path, limited: Limited, tmp_path: Path) -> None:
    """It holds what is on the host; layers that would not fit there stay where they are, and the error has numbers."""
    path, total = tmp_path / "wide.gguf", 400_000_000
    make_model.make_model(path, demo_model, make_model.Spec(n_layer=6, n_embd=512, n_ff=2048))
    seen = limited.run(TIGHT, path, total)
    assert seen["both"] < seen["host"] - 10
    assert len(seen["errors"]) == 2
    for error in seen["errors"]:
        assert re.search(r"the host needs (\d+) MiB at least, mem_budget is (\d+) MiB", error)
    assert re.search("stays on (RPC|Vulkan)0", seen["errors"][0])
    assert seen["placed"][0] > 0
    assert seen["placed"][0] >= seen["placed"][1] == seen["placed"][2] > 0
    assert seen["placed"][3] == 0
    assert seen["same"]
