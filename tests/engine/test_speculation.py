"""Speculation: a draft model proposes tokens, the model says which ones are its own, and those come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model as tiny
from rpc_devices import answer_beside_server
from running import Runner

import superllama
from superllama._engine.options import arguments

PROMPT = "The capital of France is Paris, the capital of Italy is"


def test_the_demo_model_drafts_for_itself(demo_model: Path) -> None:
    def answer(**options: str) -> superllama.Completion:
        with superllama.LLM(demo_model, n_ctx=512, n_parallel=1, **options) as llm:
            *_, last = llm.stream(PROMPT, max_tokens=24, temperature=0)
            found = llm.generate(PROMPT, max_tokens=24, temperature=0)
            assert last.timings is not None and last.timings.draft_tokens == found.timings.draft_tokens
            return found

    alone, drafted = answer(), answer(speculative=str(demo_model))
    assert drafted.tokens == alone.tokens
    assert alone.timings.draft_tokens == 0 and alone.timings.draft_acceptance is None
    assert drafted.timings.draft_tokens >= 12  # most of the answer
    assert drafted.timings.draft_acceptance is not None and drafted.timings.draft_acceptance > 0.8
    assert drafted.timings.draft_accepted < 24


def test_a_draft_that_knows_nothing_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny.write_llama(tmp_path / "other.gguf", seed=99)
    options = {"n_ctx": 512, "n_parallel": 1, "n_threads": 1, "chat_template": "chatml"}
    with superllama.LLM(tiny_model, speculative=str(other), **options) as llm:
        found = llm.generate("the one", max_tokens=32, temperature=0)
        said = llm.chat("the one", max_tokens=8, temperature=0)
    assert len(found.tokens) == 32
    assert found.timings.draft_acceptance is not None and found.timings.draft_acceptance < 0.5
    assert said.timings.draft_tokens > 0


def test_a_draft_model_is_asked(tiny_model: Path) -> None:
    words = arguments(str(tiny_model), {"speculative": str(tiny_model)})
    assert words[words.index("--spec-type") + 1] == "draft-simple"
    words = arguments(str(tiny_model), {"spec_type": "draft-eagle3", "speculative": str(tiny_model)})
    assert [words[i + 1] for i, word in enumerate(words) if word == "--spec-type"] == ["draft-eagle3"]


ON_A_DEVICE = """
import json, sys
import superllama
path, endpoint, prompt = sys.argv[1:]
superllama.add_rpc_server(endpoint)

def answer(**options): # with weights of the host as the server has them: others have kernels of their own
    shape = {"n_ctx": 512, "n_parallel": 1, "n_threads": 1, "repack": False}
    with superllama.LLM(path, dynamic_layers=True, **shape, **options) as llm:
        found = llm.generate(prompt, max_tokens=24, temperature=0)
        tiers = [layer.tier for layer in llm.layers()]
        return found.tokens, found.timings.draft_accepted, tiers.count("device"), llm.metrics().vram_own_bytes

whole = answer()
print(json.dumps([whole, answer(speculative=path, vram_budget=whole[3] * 3 // 4)]))
"""


@pytest.mark.usefixtures("no_gpu")
def test_drafts_where_a_device_has_a_part_of_both_models(demo_model: Path, run_python: Runner) -> None:
    whole, part = answer_beside_server(run_python, ON_A_DEVICE, demo_model, PROMPT)
    tokens, _, n_layers, own = whole
    drafted, n_accepted, n_there, vram = part
    assert drafted == tokens
    assert n_accepted >= 12
    assert 0 < n_there < n_layers
    assert vram <= own * 3 // 4
