"""Speculation: a draft model proposes tokens, the model says which ones are its own, and those come out."""

from __future__ import annotations

from pathlib import Path

import tiny_model as tiny

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
