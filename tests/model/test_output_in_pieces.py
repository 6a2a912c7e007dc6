"""An output matrix that is larger than the budget: multiplied with a piece at a time, with the same result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench import make_model
from dynamic import CONTEXT, MIB, budgets
from native_build import run_native
from running import Runner

import superllama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

SPEC = make_model.Spec(kind="dense", n_layer=2, n_embd=1536, n_ff=512)
OUTPUT_BYTES = 49152 * 1536 * 18 // 32
LOGITS = 16 * MIB  # of 60 tokens at once, which a plan does not know of
TOKENS = [(i * 7919) % 49000 for i in range(60)]


@pytest.fixture(scope="module", params=["separate", "tied"])
def path(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tied: the embedding is the output matrix too, looked up by rows and multiplied with."""
    file = tmp_path_factory.mktemp("output") / f"{request.param}.gguf"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tied":
            all_of = make_model.dense_tensors
            patch.setattr(
                make_model, "dense_tensors", lambda s, n: [t for t in all_of(s, n) if t.name != "output.weight"]
            )
        make_model.make_model(file, demo_model, SPEC)
    yield file
    file.unlink()


def logits_of(model: superllama.Model) -> list[np.ndarray]:
    """A prompt of which every token wants logits, and three more tokens."""
    with superllama.Context(model, **CONTEXT) as ctx:
        ctx.decode(TOKENS, logits="all")
        seen = [ctx.logits().copy()]
        for token in TOKENS[:3]:
            ctx.decode([token])
            seen.append(ctx.logits().copy())
        return seen


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("extra", "reads_ahead", "policy"), [
    (False, False, "pin"), (False, True, "pin"), (True, False, "pin"), (True, True, "pin"), (False, True, "lru"),
])  # fmt: skip
def test_the_same_logits(path: Path, extra: bool, reads_ahead: bool, policy: str) -> None:
    options = {"use_extra_bufts": extra, "async_prefetch": reads_ahead, "layer_policy": policy}
    least, full = (bytes_ + LOGITS for bytes_ in budgets(path, **options))
    with superllama.Model(path, use_extra_bufts=extra) as stock:
        reference = logits_of(stock)
    for budget in (least, (least + full) // 2, full + 16 * MIB):
        with superllama.Model(path, dynamic_layers=True, mem_budget=budget, **options) as model:
            assert equal(logits_of(model), reference), budget
            model.set_budget(least)
            assert equal(logits_of(model), reference)
            model.set_budget(full + 16 * MIB)
            assert equal(logits_of(model), reference)


def test_the_least_budget_is_without_it(path: Path) -> None:
    least, full = budgets(path, use_extra_bufts=False)
    with superllama.Model(path, dynamic_layers=True, use_extra_bufts=False, mem_budget=least + LOGITS) as model:
        logits_of(model)
        resident = model.memory()["resident"]
    assert resident < 2 * MIB
    assert full - least > OUTPUT_BYTES // 2


def test_all_of_it_is_read_once(path: Path) -> None:
    """Where the budget has room, and not besides as rows."""
    _, full = budgets(path, use_extra_bufts=False)
    with (
        superllama.Model(path, dynamic_layers=True, use_extra_bufts=False, mem_budget=full + 64 * MIB) as model,
        superllama.Context(model, **CONTEXT) as ctx,
    ):
        ctx.decode(TOKENS)
        ctx.decode([1])
        before = ctx.metrics().weight_bytes_read
        for token in TOKENS:
            ctx.decode([token])
        assert ctx.metrics().weight_bytes_read - before <= 60 * 4096 * 2
        memory = model.memory()
    assert sum(memory.values()) <= full + 64 * MIB
    if "tied" in path.name:
        assert memory["rows"] <= 8 * MIB


READ_ERROR = """
import json, os, sys
import superllama

path, least = sys.argv[1], int(sys.argv[2])
with superllama.Model(path, dynamic_layers=True, use_extra_bufts=False, mem_budget=least) as model:
    with superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1) as ctx:
        ctx.decode([1, 2, 3])
        os.truncate(path, 1 << 20)
        errors = []
        for _ in range(2):
            try:
                ctx.decode([4])
            except superllama.DecodeError as e:
                errors.append(str(e))
print(json.dumps(errors))
"""


def test_a_read_error(path: Path, tmp_path: Path, run_python: Runner) -> None:
    least, _ = budgets(path, use_extra_bufts=False)
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    done = run_python(READ_ERROR, copy, least)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2
    assert all(error.startswith("the weights could not be read: ") for error in errors)


@pytest.mark.parametrize("repack", [0, 1])
def test_random_steps(path: Path, repack: int) -> None:
    """Budgets, cancellations, states; the program compares every step with stock."""
    report = run_native("stress-layers", path, 150, 1, repack, 0)
    assert report["steps"] == 150
    assert report["cancelled"] > 0
