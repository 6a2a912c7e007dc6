"""Dynamic layers from Python: the same tokens and logits as without them, at every budget, while it changes."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import make_model
from dynamic import CONTEXT, MIB, budgets, layout

import superllama
from superllama._native import ffi, last_error, lib

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

PROMPT = "The capital of France is Paris. The capital of Italy is"
N_TOKENS = 10


@pytest.fixture(scope="module", autouse=True)
def cache(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files of repacked blocks go to a folder of the tests; the demo model is fetched before."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERLLAMA_CACHE", str(folder))
        yield folder


def quantize(model: Path, path: Path, ftype: int, pure: bool) -> Path:
    params = lib.llama_model_quantize_default_params()
    params.ftype = ftype
    params.allow_requantize = True
    params.pure = pure
    c = ffi.new("llama_model_quantize_params *", params)
    assert lib.llama_model_quantize(str(model).encode(), str(path).encode(), c) == 0
    return path


@pytest.fixture(scope="module")
def q4_0(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in a quantization that CPUs have repacked kernels for."""
    path = tmp_path_factory.mktemp("q4_0") / "demo-q4_0.gguf"
    return quantize(demo_model, path, lib.LLAMA_FTYPE_MOSTLY_Q4_0, pure=True)


Result = tuple[list[int], np.ndarray]


def greedy(ctx: superllama.Context, n: int = N_TOKENS) -> Result:
    """Tokens, and the logits before each."""
    tokens, logits = [], []
    ctx.decode(ctx.model.tokenize(PROMPT))
    for _ in range(n):
        logits.append(ctx.logits()[0].copy())
        tokens.append(int(logits[-1].argmax()))
        ctx.decode([tokens[-1]])
    return tokens, np.stack(logits)


def stock(path: Path, **kwargs: Any) -> Result:
    with superllama.Model(path, **kwargs) as model, superllama.Context(model, **CONTEXT) as ctx:
        return greedy(ctx)


def same(a: Result, b: Result) -> bool:
    return a[0] == b[0] and bool(np.array_equal(a[1], b[1]))


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("repack", [True, False], ids=["repack", "no-repack"])
@pytest.mark.parametrize("async_prefetch", [True, False], ids=["async", "sync"])
def test_the_same_as_without(q4_0: Path, async_prefetch: bool, repack: bool, cache: Path) -> None:
    reference = stock(q4_0, use_extra_bufts=repack)
    least, full = budgets(q4_0, use_extra_bufts=repack)
    n_read = {}
    for name, budget in {"least": least + MIB, "half": (least + full) // 2, "full": full + MIB}.items():
        with superllama.Model(
            q4_0, dynamic_layers=True, async_prefetch=async_prefetch, use_extra_bufts=repack, mem_budget=budget
        ) as model:
            ctx = superllama.Context(model, **CONTEXT)
            assert same(greedy(ctx), reference)
            metrics, layers = ctx.metrics(), model.layers()
        n_read[name] = metrics.weight_bytes_read
        bytes_layers = sum(layer.bytes for layer in layers)
        assert metrics.mem_budget_bytes == budget
        assert metrics.weight_bytes_resident <= budget
        if name == "full":
            assert metrics.layers_evicted == 0
            assert {layer.tier for layer in layers} == {"host"}
            assert metrics.weight_bytes_read >= bytes_layers
        else:
            # at least what does not fit, in every pass
            assert metrics.layers_evicted > N_TOKENS
            assert metrics.weight_bytes_read > N_TOKENS * (full - budget) * 0.9
            assert "disk" in {layer.tier for layer in layers}
    assert n_read["least"] > n_read["half"] > n_read["full"]
    if layout(q4_0, use_extra_bufts=repack).repacked_bytes:
        assert list((cache / "repacked").glob("*.blocks"))


@pytest.mark.parametrize("policy", ["pin", "lru"])
def test_the_demo_model(demo_model: Path, policy: str) -> None:
    least, full = budgets(demo_model)
    reference = stock(demo_model)
    with superllama.Model(
        demo_model, dynamic_layers=True, layer_policy=policy, mem_budget=(least + full) // 2
    ) as model:
        ctx = superllama.Context(model, **CONTEXT)
        assert same(greedy(ctx), reference)
        assert ctx.metrics().layers_evicted > N_TOKENS


@pytest.mark.parametrize("ahead", [False, True])
def test_experts_that_share_pages(demo_model: Path, tmp_path: Path, ahead: bool) -> None:
    """Whole pages are read: those at the border of two experts must be right for both, repacked or not."""
    path = tmp_path / "moe.gguf"
    spec = make_model.Spec(kind="moe", n_layer=4, n_embd=512, n_expert=16, n_expert_used=4, n_ff=224)
    make_model.make_model(path, demo_model, spec)
    assert 512 * 224 // 32 * 18 % 4096 != 0  # bytes of one matrix of an expert
    for repack in (True, False):
        reference = stock(path, use_extra_bufts=repack)
        least, _ = budgets(path, use_extra_bufts=repack)
        with superllama.Model(
            path, dynamic_layers=True, use_extra_bufts=repack, mem_budget=least + MIB, async_prefetch=ahead
        ) as model:
            ctx = superllama.Context(model, **CONTEXT)
            assert same(greedy(ctx), reference)
            metrics = ctx.metrics()
        assert metrics.layers_evicted > N_TOKENS
        if ahead:
            assert metrics.expert_guesses_used > N_TOKENS
            assert metrics.expert_guesses_used <= metrics.expert_guesses
        else:
            assert metrics.expert_misses > N_TOKENS
            assert metrics.expert_guesses == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_all_experts_are_there(demo_model: Path, tmp_path: Path, ahead: bool) -> None:
    """Then a graph of one token runs through, and still tells which experts it used; a smaller budget is heard."""
    path = tmp_path / "moe.gguf"
    n_layer, n_expert, n_used = 4, 16 if ahead else 8, 4
    spec = make_model.Spec(kind="moe", n_layer=n_layer, n_embd=512, n_expert=n_expert, n_expert_used=n_used, n_ff=256)
    make_model.make_model(path, demo_model, spec)
    reference = stock(path)
    least, full = budgets(path)
    with superllama.Model(path, dynamic_layers=True, mem_budget=full + MIB, async_prefetch=ahead) as model:
        ctx = superllama.Context(model, **CONTEXT)
        for part in range(
            20
        ):  # without read-ahead all have to be met; with it they come while others are computed with
            ctx.decode(list(range(300 + 40 * part, 340 + 40 * part)))
            ctx.clear()
        for token in range(100):
            ctx.decode([token])
        before = ctx.metrics()
        assert before.layers_loaded - before.layers_evicted >= n_layer * n_expert
        assert ahead or before.expert_misses == n_layer * n_expert
        for token in range(10, 20):
            ctx.decode([token])
        after = ctx.metrics()
        assert after.expert_misses == before.expert_misses
        assert after.layers_loaded == before.layers_loaded
        assert after.expert_hits - before.expert_hits == 10 * n_layer * n_used
        for budget in (full + MIB, least + MIB, full + MIB):
            model.set_budget(budget)
            ctx.clear()
            assert same(greedy(ctx), reference)
            assert ctx.metrics().weight_bytes_resident <= budget
        assert ctx.metrics().layers_evicted > N_TOKENS


def test_a_graph_that_fills_the_scheduler(demo_model: Path, tmp_path: Path) -> None:
    """Two graphs of this model have more nodes than upstream's table has room for."""
    path = tmp_path / "moe.gguf"
    spec = make_model.Spec(kind="moe", n_layer=8, n_embd=512, n_expert=64, n_expert_used=8, n_ff=64)
    make_model.make_model(path, demo_model, spec)
    with superllama.Model(path, dynamic_layers=True) as model, superllama.Context(model, **CONTEXT) as ctx:
        for n in (1, 3, 1):
            ctx.decode([1, 2, 3][:n])


@pytest.mark.parametrize("ahead", [False, True])
def test_experts_of_two_sizes(demo_model: Path, tmp_path: Path, ahead: bool) -> None:
    """Mixed quantization: frames of one size cannot serve the other, and memory goes from one to the other."""
    spec = make_model.Spec(kind="moe", n_layer=8, n_embd=512, n_expert=16, n_expert_used=4, n_ff=256)
    make_model.make_model(tmp_path / "q4_0.gguf", demo_model, spec)
    path = quantize(tmp_path / "q4_0.gguf", tmp_path / "mixed.gguf", lib.LLAMA_FTYPE_MOSTLY_Q4_K_M, pure=False)
    reference = stock(path)
    least, full = budgets(path)
    with superllama.Model(path, dynamic_layers=True, mem_budget=full + MIB, async_prefetch=ahead) as model:
        ctx = superllama.Context(model, **CONTEXT)
        assert same(greedy(ctx), reference)
        assert len({layer.bytes for layer in model.layers()}) > 1
        for budget in (least + MIB, (least + full) // 2, least + 2 * MIB, full + MIB):
            model.set_budget(budget)
            before = ctx.metrics()
            assert before.weight_bytes_resident <= budget
            ctx.clear()
            assert same(greedy(ctx), reference)
            metrics = ctx.metrics()
            assert metrics.weight_bytes_resident <= budget
            if budget < full:
                assert metrics.layers_evicted > before.layers_evicted + N_TOKENS


def test_a_damaged_file_of_repacked_blocks(q4_0: Path, cache: Path) -> None:
    least, full = budgets(q4_0)
    if not layout(q4_0).repacked_bytes:
        pytest.skip("this CPU has no repacked kernels")

    def run() -> Result:
        with superllama.Model(q4_0, dynamic_layers=True, mem_budget=(least + full) // 2) as model:
            return greedy(superllama.Context(model, **CONTEXT), 3)

    for old in (cache / "repacked").glob("*.blocks"):
        old.unlink()
    reference = run()
    (file,) = (cache / "repacked").glob("*.blocks")
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    assert same(run(), reference)  # the model has it all
    assert not file.exists()
    assert same(run(), reference)
    assert file.read_bytes() == good


def test_without_dynamic_layers(demo: superllama.Model) -> None:
    assert demo.layers() == []
    with pytest.raises(superllama.ModelError, match="without dynamic layers"):
        demo.set_budget("1GiB")


# ---------------------------------------------------------------- layers and budgets


def test_layers_add_up(demo_model: Path) -> None:
    least, full = budgets(demo_model)
    with superllama.Model(demo_model, dynamic_layers=True, mem_budget=(least + full) // 2) as model:
        ctx = superllama.Context(model, **CONTEXT)
        before = model.layers()
        assert [layer.index for layer in before] == list(range(model.n_layer))
        assert {(layer.loads, layer.last_use) for layer in before} == {(0, 0)}
        greedy(ctx, 3)
        layers, metrics = model.layers(), ctx.metrics()
    assert sum(layer.loads for layer in layers) == metrics.layers_loaded
    assert sum(layer.evictions for layer in layers) == metrics.layers_evicted > 0
    assert 0 < sum(layer.bytes_resident for layer in layers) <= metrics.weight_bytes_resident
    assert sum(layer.tier == "disk" for layer in layers) == metrics.disk_layers_active
    for layer in layers:
        assert (layer.tier == "host") == (layer.bytes_resident == layer.bytes)
        assert layer.bytes_resident in range(layer.bytes + 1)
        assert layer.last_use > 0
        assert layer.loads >= 1


@pytest.mark.parametrize("async_prefetch", [True, False], ids=["async", "sync"])
def test_budgets_change_during_generation(demo_model: Path, async_prefetch: bool) -> None:
    n = 40
    least, full = budgets(demo_model)
    with superllama.Model(demo_model) as model, superllama.Context(model, **CONTEXT) as ctx:
        reference = greedy(ctx, n)
    with superllama.Model(demo_model, dynamic_layers=True, async_prefetch=async_prefetch, mem_budget=full) as model:
        ctx = superllama.Context(model, **CONTEXT)
        rng, done, n_changes = random.Random(1), threading.Event(), 0

        def change() -> None:
            nonlocal n_changes
            while not done.wait(0.003):
                model.set_budget(rng.randrange(least, full))
                n_changes += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            # a busy machine gives the other thread few turns: go on until it had some
            while n_changes <= 10:
                assert same(greedy(ctx, n), reference)
        finally:
            done.set()
            thread.join()
        assert ctx.metrics().layers_evicted > 10

        # down and up, seen in what is resident
        model.set_budget(least)
        small = sum(layer.bytes_resident for layer in model.layers())
        ctx.decode([1])
        assert ctx.metrics().weight_bytes_resident <= least
        model.set_budget(full + MIB)
        ctx.decode([1])
        assert {layer.tier for layer in model.layers()} == {"host"}
        assert sum(layer.bytes_resident for layer in model.layers()) > small
        model.set_budget("auto")
        ctx.decode([1])


def test_a_budget_too_small_names_one_that_works(demo_model: Path) -> None:
    with pytest.raises(superllama.ModelError, match=r"mem_budget: 5 MiB are too few.*the least that works is \d+ MiB"):
        superllama.Model(demo_model, dynamic_layers=True, mem_budget="5MiB")

    with superllama.Model(demo_model, dynamic_layers=True, mem_budget="72MiB") as model:
        with pytest.raises(superllama.ContextError, match="least that works is") as e:
            superllama.Context(model, **CONTEXT | {"n_ctx": 2048})
        least = named_least(e)
        with pytest.raises(superllama.ModelError, match="least that works is") as too_small:
            model.set_budget("1MiB")
        assert named_least(too_small) < 72
        assert model.layers()  # usable still

    with superllama.Model(demo_model, dynamic_layers=True, mem_budget=f"{least}MiB") as model:
        ctx = superllama.Context(model, **CONTEXT | {"n_ctx": 2048})
        result = greedy(ctx, 2)
        assert ctx.metrics().layers_evicted > 0
    with superllama.Model(demo_model) as model, superllama.Context(model, **CONTEXT | {"n_ctx": 2048}) as ctx:
        assert same(result, greedy(ctx, 2))
    with (
        pytest.raises(superllama.ContextError),
        superllama.Model(demo_model, dynamic_layers=True, mem_budget=f"{least - 2}MiB") as model,
    ):
        superllama.Context(model, **CONTEXT | {"n_ctx": 2048})


def test_a_model_with_dynamic_layers_is_not_saved(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.gguf"
    with superllama.Model(demo_model, dynamic_layers=True, mem_budget="72MiB") as model:
        lib.llama_model_save_to_file(model._c, str(path).encode())
        assert "llama_model_save_to_file: not with dynamic layers" in last_error()
        assert not path.exists()
    with superllama.Model(demo_model, use_extra_bufts=False) as model:
        lib.llama_model_save_to_file(model._c, str(path).encode())
        assert path.stat().st_size > 0.9 * demo_model.stat().st_size


def named_least(e: pytest.ExceptionInfo[superllama.Error]) -> int:
    found = re.search(r"least that works is (\d+) MiB", str(e.value))
    assert found
    return int(found[1])


# ---------------------------------------------------------------- threads


def test_two_contexts_in_two_threads(demo_model: Path) -> None:
    reference = stock(demo_model)
    least, full = budgets(demo_model)
    with superllama.Model(
        demo_model, dynamic_layers=True, async_prefetch=True, mem_budget=(least + full) // 2 + 16 * MIB
    ) as model:
        contexts = [superllama.Context(model, **CONTEXT | {"n_threads": 1}) for _ in range(2)]
        results: list[Result | None] = [None, None]

        def run(i: int) -> None:
            results[i] = greedy(contexts[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert contexts[0].metrics().layers_evicted > N_TOKENS
    for result in results:
        assert result is not None
        assert same(result, reference)
