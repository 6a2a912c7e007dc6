"""How often each expert is chosen: counts of routers that are known, whatever comes and goes; and who tells of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bench import make_model
from dynamic import CONTEXT, MIB, budgets
from serving import http_server

import superllama
from superllama._metrics import ExpertCounts, Metrics
from superllama._report.file import read_metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

N_LAYER, N_EXPERT, N_USED = 3, 16, 4
TOKENS = [int(t) for t in np.random.default_rng(1).integers(300, 2000, 90)]


@pytest.fixture(scope="module", autouse=True)
def cache(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of repacked blocks go to a folder of the tests; the demo model is fetched before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERLLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclasses.dataclass
class Known:
    """A model whose routers are known: that of layer 0 looks at the token, those of others at a constant."""

    path: Path
    routers: list[np.ndarray] = dataclasses.field(default_factory=list)

    def uses(self, tokens: list[int], n_batch: int = 1) -> np.ndarray:
        """[n_layers, n_experts]: how often each expert has to be chosen, computed from the weights in the file. The
        last layer computes only tokens whose output is asked for: the last of each batch."""
        tensors = {t.name: t for t in gguf.GGUFReader(self.path).tensors}
        embedding = tensors["token_embd.weight"]
        found = np.zeros((N_LAYER, N_EXPERT), np.int64)
        for i, token in enumerate(tokens):
            asked = i % n_batch == n_batch - 1 or i == len(tokens) - 1
            row = gguf.dequantize(embedding.data[token : token + 1], embedding.tensor_type)[0]
            for layer, router in enumerate(self.routers if asked else self.routers[:-1]):
                found[layer, np.argsort(router @ row)[-N_USED:]] += 1
        return found


@pytest.fixture(scope="module")
def known(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    found = Known(tmp_path_factory.mktemp("known") / "moe.gguf")

    def router(_: Any, res: Any, n_expert: int) -> np.ndarray:
        layer, rows = len(found.routers), np.zeros((n_expert, res.n_embd), np.float32)
        random = np.random.default_rng(layer)
        if layer == 0:
            rows[:, : res.n_token] = random.standard_normal((n_expert, res.n_token))
        else:
            rows[:, -res.n_const :] = random.permutation(n_expert)[:, None] / res.n_const
        found.routers.append(rows)
        return rows

    spec = make_model.Spec(kind="moe", n_layer=N_LAYER, n_embd=512, n_expert=N_EXPERT, n_expert_used=N_USED, n_ff=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_model.moe_design, "router", router)
        make_model.make_model(found.path, demo_model, spec)
    return found


def decode(ctx: superllama.Context, tokens: list[int], n_batch: int, seq: int = 0) -> np.ndarray:
    """The logits after each batch."""
    found = []
    for i in range(0, len(tokens), n_batch):
        ctx.decode(tokens[i : i + n_batch], seq=seq)
        found.append(ctx.logits()[0].copy())
    return np.stack(found)


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("n_batch", [1, 3, 45])
@pytest.mark.parametrize("budget", ["least", "full"])
@pytest.mark.parametrize("ahead", [False, True])
def test_counts_are_those_of_the_routers(known: Known, budget: str, n_batch: int, ahead: bool) -> None:
    """Also where experts are evicted, and where a graph of one token runs through without a stop."""
    with superllama.Model(known.path) as model, superllama.Context(model, **CONTEXT) as ctx:
        reference = decode(ctx, TOKENS, n_batch)
        assert model.experts().uses.shape == (0, 0)  # nothing is counted without dynamic layers
    least, full = budgets(known.path)
    with superllama.Model(
        known.path, dynamic_layers=True, mem_budget=(least if budget == "least" else full) + MIB, async_prefetch=ahead
    ) as model:
        ctx = superllama.Context(model, **CONTEXT)
        assert np.array_equal(decode(ctx, TOKENS, n_batch), reference)
        experts, metrics = model.experts(), ctx.metrics()
    assert experts.layers.tolist() == list(range(N_LAYER))
    assert np.array_equal(experts.uses, known.uses(TOKENS, n_batch))
    assert experts.uses[:-1].sum() == len(TOKENS) * N_USED * (N_LAYER - 1)
    assert experts.misses.sum() == metrics.expert_misses
    assert (experts.loads >= experts.resident).all()
    if budget == "least":
        assert metrics.layers_evicted > 0
        assert not experts.resident.all()
    assert set(experts.tier.flat) <= {0, 1}


def test_two_sequences_and_two_contexts_count_together(known: Known) -> None:
    with superllama.Model(known.path, dynamic_layers=True) as model:
        a = superllama.Context(model, n_seq_max=2, kv_unified=True, **CONTEXT)
        b = superllama.Context(model, **CONTEXT)
        decode(a, TOKENS[:20], 1, seq=0)
        decode(a, TOKENS[20:40], 5, seq=1)
        decode(b, TOKENS[40:], 50)
        expected = known.uses(TOKENS[:20]) + known.uses(TOKENS[20:40], 5) + known.uses(TOKENS[40:], 50)
        assert np.array_equal(model.experts().uses, expected)


def test_they_are_counted_while_the_budget_changes(known: Known) -> None:
    least, full = budgets(known.path)
    with superllama.Model(known.path, dynamic_layers=True, mem_budget=full + MIB) as model:
        ctx = superllama.Context(model, **CONTEXT)
        for i, token in enumerate(TOKENS):
            model.set_budget((full, least)[i // 10 % 2] + MIB)
            ctx.decode([token])
        experts = model.experts()
    assert np.array_equal(experts.uses, known.uses(TOKENS))
    assert experts.loads.sum() > N_LAYER * N_EXPERT / 2


def test_a_result_stays_as_it_is(known: Known) -> None:
    with superllama.Model(known.path, dynamic_layers=True) as model:
        experts = model.experts()
        with superllama.Context(model, **CONTEXT) as ctx:
            ctx.decode([1])
        assert experts.uses.sum() == 0 < model.experts().uses.sum()
    with pytest.raises(ValueError, match="read-only"):
        experts.uses[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        experts.uses = experts.misses  # type: ignore[misc]
    with pytest.raises(superllama.ModelError, match="closed"):
        model.experts()


def test_a_dense_model_has_none(demo_model: Path) -> None:
    with superllama.Model(demo_model, dynamic_layers=True) as model:
        assert model.experts().uses.shape == (0, 0)
        assert "experts" not in model._repr_html_()


# ---------------------------------------------------------------- who tells of it


def test_the_file_the_report_and_the_notebook(known: Known, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    with superllama.Model(known.path, dynamic_layers=True) as model:
        with superllama.Context(model, metrics_file=file, metrics_interval_ms=0, **CONTEXT) as ctx:
            decode(ctx, TOKENS[:10], 1)
            assert ctx.metrics().experts is None
        assert "half of 120 choices went to" in model._repr_html_()
    lines = [Metrics.model_validate_json(text) for text in file.read_text().splitlines()]
    told = [i for i, line in enumerate(lines) if line.experts is not None]
    assert told == [0, len(lines) - 1]  # thousands of numbers are not for each line
    last = lines[-1].experts
    assert last is not None and np.array_equal(last.uses, known.uses(TOKENS[:10]))
    (run,) = read_metrics(file).runs
    assert run.experts == last.model_dump()


def test_a_server_and_an_engine(known: Known, tmp_path: Path) -> None:
    with http_server(known.path, tmp_path / "log", "-c", 256, "-np", 1, "--dynamic-layers", "--no-warmup") as server:
        before = ExpertCounts.model_validate(server.request("/superllama?experts=1")[1]["experts"])
        server.complete(TOKENS[:8], n_predict=5, ignore_eos=True)
        status, found = server.request("/superllama?experts=1")
        plain, zero = (server.request(f"/superllama{query}")[1] for query in ("", "?experts=0"))
    after = ExpertCounts.model_validate(found["experts"])
    assert status == 200 and "experts" not in plain and "experts" not in zero
    # the fifth was not computed further, and of the prompt the last layer computes one token
    expected = [(8 + 4) * N_USED] * (N_LAYER - 1) + [(1 + 4) * N_USED]
    # a server decodes a few tokens while it starts, to see what the model can do
    assert (np.sum(after.uses, axis=1) - np.sum(before.uses, axis=1)).tolist() == expected
    assert json.dumps(found["metrics"]["experts"]) == "null"
    with superllama.LLM(known.path, n_ctx=256, dynamic_layers=True) as llm:  # with a warm-up, which is not counted
        begin = llm.experts().uses
        assert begin.sum(axis=1).max() < N_EXPERT * 2
        llm.generate(TOKENS[:8], max_tokens=5, ignore_eos=True)
        assert (llm.experts().uses - begin).sum(axis=1).tolist() == expected
