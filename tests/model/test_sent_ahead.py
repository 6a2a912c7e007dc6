"""Prompts of a model of which a card has a part: the weights of the rest are sent while it computes, before it is their
turn, and every logit is that of a static placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import make_model
from cards import show_card
from mixtures import make_mixture, run_script
from running import Runner


@pytest.fixture(params=["dense", "experts"])
def model(request: pytest.FixtureRequest, demo_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    if request.param == "experts":
        return make_mixture(path, demo_model, n_layer=12, n_expert=16, n_used=4, n_ff=384)
    make_model.make_model(path, demo_model, make_model.Spec(n_layer=12, n_embd=256, n_ff=2304))
    return path


@pytest.fixture(params=["card"], autouse=True)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    show_card(request, monkeypatch)


COMMON = """
def load(**params):
    model = superllama.Model(path, dynamic_layers=True, **params)
    return model, open_context(model)

def rows_of(ctx):
    "Logits after two prompts, and after one token."
    rows = []
    ctx.clear()
    for tokens in (TOKENS[:32], TOKENS[32:64], TOKENS[64:65]):
        ctx.decode(tokens)
        rows.append(ctx.logits()[-1].tobytes())
    return rows

def there():
    "Layers on the card, as -ngl counts them."
    return [layer.tier for layer in model.layers()].count("device")

references = {}

def same(rows):
    "As those of a static placement."
    n = there()
    if n not in references:
        with superllama.Model(path, n_gpu_layers=n) as static, open_context(static) as alone:
            references[n] = rows_of(alone)
    return rows == references[n]

TOKENS = TOKENS + TOKENS[:1]
model, ctx = load()
rows_of(ctx)
full = ctx.metrics().vram_own_bytes
model.close()
"""


def run(run_python: Runner, script: str, path: Path) -> dict[str, Any]:
    return run_script(run_python, COMMON + script, path, "gpu")


BUDGETS = """
model, ctx = load(async_prefetch=True)
found = []
for share, host in ((0.8, 1), (0.7, 0.5), (1.0, 1), (0.7, 1)):
    model.set_budget(mem_budget=1 << 40)
    model.set_budget(vram=int(share * full))
    ctx.decode(TOKENS[:32]) # buffers of the host have their size
    model.set_budget(mem_budget=host_budget(model, host))
    before = ctx.metrics()
    rows = rows_of(ctx)
    m = ctx.metrics()
    found.append({"share": share, "same": same(rows), "own": m.vram_own_bytes, "budget": m.vram_budget_bytes,
                  "mem": sum(m.memory_by_tag.values()), "mem_budget": m.mem_budget_bytes,
                  "ahead": m.weight_bytes_ahead - before.weight_bytes_ahead})
model.close()
model, ctx = load(vram_budget=int(0.7 * full)) # reads nothing ahead, and sends nothing
alone = [same(rows_of(ctx)), ctx.metrics().weight_bytes_ahead]
model.close()
pinned = {"override_tensor": {"ffn_down": "CPU"}}
with superllama.Model(path, n_gpu_layers=99, **pinned) as static, open_context(static) as other:
    want = rows_of(other)
model, ctx = load(async_prefetch=True, **pinned)
print(json.dumps({"found": found, "alone": alone, "pinned": [rows_of(ctx) == want, ctx.metrics().weight_bytes_ahead]}))
"""


def test_budgets_that_change_between_prompts(model: Path, run_python: Runner) -> None:
    script = run(run_python, BUDGETS, model)
    for found in script["found"]:
        assert found["same"], found
        assert found["own"] <= found["budget"]
        assert found["mem"] <= found["mem_budget"]
        assert (found["ahead"] > 0) == (found["share"] < 1)
    assert script["alone"] == [True, 0]
    assert script["pinned"][0] and script["pinned"][1] > 0  # all else is on the card
