"""A mixture of experts larger than a card: its layers compute there, with experts that come and go, and every logit is
that of a card which has all of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cards import show_card
from mixtures import make_mixture, run_script
from running import Runner

N_LAYER, N_EXPERT, N_USED = 4, 32, 4


@pytest.fixture(scope="module")
def mixture(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "moe.gguf"
    return make_mixture(path, demo_model, N_LAYER, N_EXPERT, N_USED, n_ff=384)


@pytest.fixture(params=["card"], autouse=True)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    show_card(request, monkeypatch)


COMMON = """
N_SHORT = 2 # tokens of a batch, for which the smallest bank here has slots enough

def rows_of(ctx, n=10):
    "Logits after a prompt that experts of the host are copied to the card for, then after short batches."
    ctx.clear()
    rows = []
    def add(tokens):
        ctx.decode(tokens)
        rows.append(ctx.logits()[-1].tobytes())
    add(TOKENS[:40])
    for i in range(n):
        add(TOKENS[40 + i : 41 + i])
    add(TOKENS[50 : 50 + N_SHORT])
    return rows

def static(n_gpu_layers=99, **params):
    with superllama.Model(path, n_gpu_layers=n_gpu_layers, **params) as model, open_context(model) as ctx:
        return rows_of(ctx)

def opened():
    "A model of which the card has as much as it can, a context, and the bytes that are there."
    model = superllama.Model(path, dynamic_layers=True)
    ctx = open_context(model)
    rows_of(ctx)
    return model, ctx, ctx.metrics().vram_own_bytes

def part(share, **params):
    "Where the card holds this share of it: logits, metrics, how many layers are there, and which experts."
    with superllama.Model(path, dynamic_layers=True, **params) as model:
        with open_context(model) as ctx:
            rows_of(ctx)
            full = ctx.metrics().vram_own_bytes
        model.set_budget(vram=int(share * full))
        with open_context(model) as ctx:
            tiers = [layer.tier for layer in model.layers()]
            return rows_of(ctx), ctx.metrics(), tiers.count("device"), model.experts().tier == 2

def there(model):
    "Experts on the card, of each layer."
    return (model.experts().tier == 2).sum(axis=1).tolist()
"""


def run(run_python: Runner, script: str, path: Path) -> dict[str, Any]:
    return run_script(run_python, COMMON + script, path, "gpu")


SMALLER = """
want = static()
model, ctx, full = opened()
found = []
for share in (1.0, 0.85, 0.65, 0.75, 1.0, 0.7):
    model.set_budget(vram=int(share * full))
    got = rows_of(ctx)
    before, m = [ctx.metrics(), rows_of(ctx), ctx.metrics()][::2]
    found.append({"share": share, "same": got == want, "there": there(model), "own": m.vram_own_bytes,
                  "budget": m.vram_budget_bytes, "hits": m.expert_device_hits - before.expert_device_hits,
                  "misses": m.expert_device_misses - before.expert_device_misses, "layers": m.gpu_layers_active,
                  "up": m.devices[0].bytes_up - before.devices[0].bytes_up})
print(json.dumps({"found": found}))
"""


def test_the_same_logits_with_fewer_experts_there(mixture: Path, run_python: Runner) -> None:
    found = run(run_python, SMALLER, mixture)["found"]
    for budget in found:
        assert budget["same"], budget["share"]
        assert budget["own"] <= budget["budget"]
        assert budget["layers"] == N_LAYER
        if budget["share"] < 1:
            assert all(N_USED * 2 <= n < N_EXPERT for n in budget["there"])
            assert budget["hits"] + budget["misses"] >= N_LAYER * N_USED * 10
            assert budget["hits"] > 0
        else:
            assert budget["there"] == [N_EXPERT] * N_LAYER
            assert budget["hits"] == budget["misses"] == budget["up"] == 0
    assert sum(found[2]["there"]) < sum(found[1]["there"])
    assert found[2]["misses"] > found[1]["misses"]
    sent = {budget["up"] / budget["misses"] for budget in found if budget["misses"]}
    assert len(sent) == 1  # bytes of an expert, and nothing else


SHARED = """
os.environ["SUPERLLAMA_EXPERTS"] = "0.4"
want = static()
ours, m, _, _ = part(0.7, expert_misses="share")
close = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in
         ([np.frombuffer(row, np.float32) for row in pair] for pair in zip(ours, want))]
print(json.dumps({"close": close, "hits": m.expert_device_hits, "misses": m.expert_device_misses,
                  "computed": m.expert_host_computed}))
"""


def test_misses_that_are_shared_with_the_host(mixture: Path, run_python: Runner) -> None:
    """The processor's kernels round in other places than the card's, as they do with any other placement."""
    found = run(run_python, SHARED, mixture)
    assert max(found["close"]) < 0.05
    assert found["hits"] > 0 and 0 < found["computed"] < found["misses"]


PROMPT = """
want = static()
model, ctx, full = opened()
model.close()
found = []
for is_small in (False, True): # the host's memory
    model = superllama.Model(path, dynamic_layers=True, async_prefetch=True, vram_budget=int(0.7 * full))
    ctx = open_context(model)
    if is_small:
        model.set_budget(mem_budget=host_budget(model, 1 / 2))
    before = model.experts().tier == 2
    ctx.decode(TOKENS[:40])
    after, uses = model.experts().tier == 2, model.experts().uses
    found.append({"came": [layer[new].tolist() for layer, new in zip(uses, after & ~before)],
                  "absent": [layer[~there].tolist() for layer, there in zip(uses, after)],
                  "same": rows_of(ctx) == want})
    model.close()
print(json.dumps({"found": found}))
"""


def test_a_prompt_warms_the_banks(mixture: Path, run_python: Runner) -> None:
    """Of the experts that were on the card for the prompt, those that it chose most often stay."""
    for found in run(run_python, PROMPT, mixture)["found"]:
        assert found["same"]
        for came, absent in zip(found["came"][:-1], found["absent"][:-1], strict=True):  # the last layer has one token
            assert came and min(came) >= max(absent)


GUESSED = """
want = static()
model, ctx, full = opened()
model.close()
found = []
for ahead in (False, True):
    vram = int(0.7 * full)
    with superllama.Model(path, dynamic_layers=True, async_prefetch=ahead, vram_budget=vram) as model:
        with open_context(model) as ctx:
            rows_of(ctx)
            before = ctx.metrics()
            same = all([rows_of(ctx) == want for _ in range(3)])
            m = ctx.metrics()
            counts = {name: getattr(m, "expert_device_" + name) - getattr(before, "expert_device_" + name)
                      for name in ("hits", "misses", "guesses", "guesses_used")}
            up = m.devices[0].bytes_up - before.devices[0].bytes_up
            found.append({"same": same, "up": up, **counts})
print(json.dumps({"found": found}))
"""


def test_experts_are_sent_before_they_are_chosen(mixture: Path, run_python: Runner) -> None:
    alone, ahead = run(run_python, GUESSED, mixture)["found"]
    assert alone["same"] and ahead["same"]
    assert alone["guesses"] == 0 < alone["misses"]
    assert 0 < ahead["guesses_used"] < ahead["guesses"]
    assert ahead["hits"] + ahead["misses"] == alone["hits"] + alone["misses"]
    expert_bytes = alone["up"] / alone["misses"]
    assert ahead["up"] == (ahead["misses"] + ahead["guesses"]) * expert_bytes


DISK = """
want = static()
with superllama.Model(path, dynamic_layers=True) as model, open_context(model) as ctx:
    rows_of(ctx)
    full = ctx.metrics().vram_own_bytes
vram = int(0.65 * full)
model = superllama.Model(path, dynamic_layers=True, async_prefetch=True, vram_budget=vram)
ctx = open_context(model)
least = host_budget(model, 1 / 4)
model.set_budget(mem_budget=least)
base = ctx.metrics()
same = [rows_of(ctx) == want for _ in range(3)]
m = ctx.metrics()
tier = model.experts().tier
print(json.dumps({"same": same, "disk": int((tier == 1).sum()), "device": int((tier == 2).sum()),
                  "host": int((tier == 0).sum()), "own": m.vram_own_bytes, "vram": vram,
                  "mem": sum(m.memory_by_tag.values()), "budget": least, "read": m.expert_misses - base.expert_misses,
                  "down": m.devices[0].bytes_down}))
"""


def test_larger_than_card_and_memory(mixture: Path, run_python: Runner) -> None:
    """A part of the experts is nowhere but on disk; neither budget is exceeded."""
    found = run(run_python, DISK, mixture)
    assert found["same"] == [True] * 3
    assert found["own"] <= found["vram"] and found["mem"] <= found["budget"]
    assert found["disk"] > 0 and found["device"] > 0 and found["read"] > 0
    assert found["down"] > 0  # what left the card stayed in memory, where it had room


PEAKS = """
from bench.gpu_turn import in_use
from bench.peak import Peak

before = in_use()
with superllama.Model(path, dynamic_layers=True) as model:
    weights = in_use() - before
found = []
for share in (1.0, 0.9, 0.6, 0.3):
    budget = int(share * weights)
    watch = Peak(in_use)
    with superllama.Model(path, dynamic_layers=True, async_prefetch=True, vram_budget=budget) as model:
        with open_context(model) as ctx:
            rows_of(ctx)
            model.set_budget(vram=budget * 3 // 4)
            rows_of(ctx)
            model.set_budget(vram=budget)
            rows_of(ctx)
    found.append([budget, watch.rise()])
del os.environ["SUPERLLAMA_EXPERTS"] # so the link is measured
small, watch = 8 << 20, Peak(in_use)
with superllama.Model(path, dynamic_layers=True, vram_budget=small):
    pass
print(json.dumps({"weights": weights, "found": found, "small": [small, watch.rise()]}))
"""


def test_no_peak_is_above_the_budget(mixture: Path, run_python: Runner) -> None:
    """While it loads, a context comes, and experts leave for it: what the card itself shows."""
    if "LIMITED_GPU_BYTES" not in os.environ:
        pytest.skip("what the driver of a real card takes besides is in that number")
    found = run(run_python, PEAKS, mixture)
    own_of_backend = 128 << 10
    for budget, peak in found["found"]:
        assert budget / 2 < peak <= budget + own_of_backend, found
    budget, peak = found["small"]
    assert peak <= budget + own_of_backend


FAULTS = """
import ctypes
shim = ctypes.CDLL(None)
want = static()
model, ctx, full = opened()
model.close()
model = superllama.Model(path, dynamic_layers=True, async_prefetch=True, vram_budget=int(0.65 * full))
ctx = open_context(model)
model.set_budget(mem_budget=host_budget(model, 1 / 4))
assert rows_of(ctx) == want
failed, other = 0, set()
for after in range(0, 24, 3): # reads in the middle of a graph, whichever comes
    shim.fault_arm(after, 4, 0)
    try:
        for token in TOKENS[:6]:
            ctx.decode([token])
            ctx.logits()
    except superllama.DecodeError as error:
        failed += 1
        if "could not be" not in str(error):
            other.add(str(error))
    shim.fault_arm(0, 0, 0)
    ctx.clear()
print(json.dumps({"failed": failed, "other": sorted(other), "same": rows_of(ctx) == want}))
"""


def test_experts_that_cannot_be_read(
    mixture: Path, run_python: Runner, fault_shim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call says so, nothing of that graph is used, and the next one is exact."""
    monkeypatch.setenv("LD_PRELOAD", str(fault_shim))
    monkeypatch.setenv("FAULT_PATH", str(mixture))
    found = run(run_python, FAULTS, mixture)
    assert found["failed"] > 0
    assert found["other"] == []
    assert found["same"]


CUTS = """
want = static()
model = superllama.Model(path, dynamic_layers=True, async_prefetch=True)
ctx, other = open_context(model), open_context(model)
rows_of(ctx)
rows_of(other)
full = ctx.metrics().vram_own_bytes
done, errors = threading.Event(), []

def move():
    random = np.random.default_rng(7)
    try:
        while not done.is_set():
            model.set_budget(vram=int(full * random.uniform(0.76, 1)))
            time.sleep(float(random.uniform(0, 0.2)))
    except Exception as error:
        errors.append(repr(error))

thread = threading.Thread(target=move)
thread.start()
same = [rows_of(c) == want for _ in range(4) for c in (ctx, other)]
done.set()
thread.join()
m = ctx.metrics()
print(json.dumps({"same": same, "errors": errors, "misses": m.expert_device_misses, "own": m.vram_own_bytes,
                  "budget": m.vram_budget_bytes}))
"""


def test_budgets_that_change_while_it_computes(mixture: Path, run_python: Runner) -> None:
    found = run(run_python, CUTS, mixture)
    assert found["errors"] == []
    assert all(found["same"]), found["same"]
    assert found["misses"] > 0
    assert found["own"] <= found["budget"]


CONVERTED = """
# the processor's own layout is used only where no host memory is the card's own kind
ours, m, placed, _ = part(0.7, no_host=True)
same = ours == static(placed, no_host=True)
print(json.dumps({"same": same, "placed": placed, "asked": m.expert_device_hits + m.expert_device_misses}))
"""


def test_converted_experts_stay_with_their_layers(mixture: Path, run_python: Runner) -> None:
    """Experts in another layout than the file's cannot be sent from host memory: then whole layers move, exactly."""
    found = run(run_python, CONVERTED, mixture)
    assert found["same"]
    assert 0 < found["placed"] < N_LAYER + 1
    assert found["asked"] == 0


STAYING = """
os.environ["SUPERLLAMA_EXPERTS"] = "stay"
ours, m, _, tiers = part(0.75)
every, some = tiers.all(axis=1).tolist(), tiers.any(axis=1).tolist()
kept = every.count(False)
same = ours == static(override_tensor={f"blk.[0-{kept - 1}].ffn_.*_exps": "CPU"})
os.environ["SUPERLLAMA_EXPERTS"] = "perhaps"
try:
    superllama.Model(path, dynamic_layers=True)
    said = ""
except superllama.ModelError as error:
    said = str(error)
print(json.dumps({"same": same, "tiers": [every, some], "kept": kept, "layers": m.gpu_layers_active,
                  "asked": m.expert_device_hits + m.expert_device_misses, "said": said}))
"""


def test_experts_stay_where_the_link_is_slow(mixture: Path, run_python: Runner) -> None:
    """Then those of the last layers are on the card, and others are computed on the host: stock's -ncmoe, exactly."""
    found = run(run_python, STAYING, mixture)
    assert found["same"]
    assert found["layers"] == N_LAYER and 0 < found["kept"] < N_LAYER
    assert found["tiers"][0] == found["tiers"][1] == [False] * found["kept"] + [True] * (N_LAYER - found["kept"])
    assert found["asked"] == 0
    assert "SUPERLLAMA_EXPERTS=perhaps" in found["said"]


BOTH = """
os.environ["SUPERLLAMA_EXPERTS"] = "0.35"
sent = static()
model, ctx, full = opened()
found = []
for share in (0.9, 0.5, 0.85, 0.5, 1.0):
    model.set_budget(vram=int(share * full))
    rows, m = rows_of(ctx), ctx.metrics()
    on_card = model.experts().tier == 2
    every, some = on_card.all(axis=1), on_card.any(axis=1)
    kept = int((~every).sum())
    sends = bool((some & ~every).any())
    pins = {f"blk.[0-{kept - 1}].ffn_.*_exps": "CPU"}
    want = sent if sends or kept == 0 else static(override_tensor=pins)
    found.append({"share": share, "sends": sends, "same": rows == want, "own": m.vram_own_bytes,
                  "budget": m.vram_budget_bytes})
print(json.dumps({"found": found}))
"""


def test_whether_experts_are_sent_hangs_on_how_many_there_are(mixture: Path, run_python: Runner) -> None:
    """It changes with the budget, on a live context."""
    found = run(run_python, BOTH, mixture)["found"]
    assert [budget["sends"] for budget in found] == [True, False, True, False, False]
    for budget in found:
        assert budget["same"], budget["share"]
        assert budget["own"] <= budget["budget"]


SPECULATION = """
def answer(**options):
    shape = {"n_ctx": 256, "n_ubatch": 64, "n_parallel": 1, "n_threads": 2}
    with superllama.LLM(path, speculative=path, spec_draft_n_max=3, **shape, **options) as llm:
        found = llm.generate(PROMPT, max_tokens=16, temperature=0)
        return found.tokens, found.timings.draft_accepted, llm.metrics()

tokens, n_accepted, _ = answer(n_gpu_layers=99)
full = answer(dynamic_layers=True)[2].vram_own_bytes
got, n_got, m = answer(dynamic_layers=True, vram_budget=int(0.8 * full))
print(json.dumps({"same": got == tokens, "accepted": [n_accepted, n_got], "hits": m.expert_device_hits,
                  "misses": m.expert_device_misses, "own": m.vram_own_bytes, "budget": m.vram_budget_bytes}))
"""


def test_drafts_are_checked_with_experts_that_come(mixture: Path, run_python: Runner) -> None:
    """The model drafts for itself, both have a part of their experts on the card."""
    found = run(run_python, SPECULATION, mixture)
    assert found["same"]
    assert found["accepted"][0] == found["accepted"][1] > 6
    assert found["hits"] > 0 and found["misses"] > 0
    assert found["own"] <= found["budget"]
