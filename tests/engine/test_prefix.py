"""What was computed of the same beginning is used again, and only what may be: windows and states cannot go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import superllama

# plain attention, windows, recurrent states alone and beside attention
KINDS = ["llama-dense", "gemma3-dense", "gpt-oss-moe", "mamba-dense", "falcon-h1-dense", "lfm2-dense", "qwen3next-moe"]


def top_of(llm: superllama.LLM, prompt: list[int], **request: Any) -> tuple[dict[int, float], int]:
    """The likely next tokens and their log-probabilities, and how many tokens of the prompt were there."""
    answer = llm.generate(prompt, max_tokens=1, temperature=0, logprobs=8, **request)
    assert answer.logprobs is not None
    return {entry.token: entry.logprob for entry in answer.logprobs[0].top}, answer.usage.cached_tokens


def same(found: dict[int, float], expected: dict[int, float]) -> None:
    """As far as batches of other sizes compute the same: last bits differ; of a wrong state comes something else."""
    common = found.keys() & expected.keys()
    assert len(common) >= 6
    np.testing.assert_allclose([found[t] for t in common], [expected[t] for t in common], atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_may_be_used_again(kind: str, architectures: dict[str, Path]) -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(10, 100, 200).tolist()
    longer = first + rng.integers(10, 100, 40).tolist()
    other_end = first[:120] + rng.integers(10, 100, 80).tolist()
    other = rng.integers(10, 100, 100).tolist()
    with superllama.LLM(architectures[kind], n_parallel=1, n_threads=1, n_ctx=512, flags={"warmup": False}) as llm:
        fresh = {len(p): top_of(llm, p, cache_prompt=False)[0] for p in (first, longer, other)}
        fresh_end = top_of(llm, other_end, cache_prompt=False)[0]
        for prompt in (first, longer, first, other, longer):
            found, cached = top_of(llm, prompt)
            assert 0 <= cached < len(prompt)
            same(found, fresh[len(prompt)])
        top_of(llm, first)
        found, cached = top_of(llm, longer)
        assert cached >= len(first) - 1 or kind != "llama-dense"
        same(found, fresh[len(longer)])
        found, cached = top_of(llm, other_end)
        assert cached <= 120
        same(found, fresh_end)
