"""The paged KV cache from Python: the same text within a small budget, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import superllama

PROMPT = "The history of the city begins"


def test_many_conversations_in_little_memory(demo: superllama.Model, tmp_path: Path) -> None:
    options = {"n_ctx": 8 * 512, "n_seq_max": 8, "n_threads": 1, "flash_attn": "on"}
    with superllama.Context(demo, **options) as plain:
        expected = [
            "".join(p.text for p in plain.generate(f"{PROMPT} {i}", seq=i, max_tokens=60, temperature=0))
            for i in range(8)
        ]
        expected += [
            "".join(p.text for p in plain.generate(" and", seq=i, keep=True, max_tokens=20, temperature=0))
            for i in range(8)
        ]
    paging = {"paged_kv": True, "kv_page_size": 64, "kv_budget": "20MiB", "spill_dir": tmp_path, "async_prefetch": True}
    with superllama.Context(demo, **options, **paging) as paged:
        found = [
            "".join(p.text for p in paged.generate(f"{PROMPT} {i}", seq=i, max_tokens=60, temperature=0))
            for i in range(8)
        ]
        for i in range(8):
            if i % 2:  # the others come back when they run
                paged.prefetch(i)
            found.append(
                "".join(p.text for p in paged.generate(" and", seq=i, keep=True, max_tokens=20, temperature=0))
            )
        pages, metrics = paged.kv_pages(), paged.metrics()
    assert found == expected
    assert pages.paged
    assert pages.restored > 0
    assert pages.prefetched_used > 0
    assert pages.resident_peak_bytes <= pages.budget_bytes
    assert metrics.kv_pages_evicted == pages.evicted_clean + pages.evicted_dirty > 0
    assert metrics.kv_bytes_read == pages.bytes_read > 0
    assert len(pages.sequences) == 8
    assert all(s.tokens > 60 for s in pages.sequences)


def test_a_large_context_costs_what_is_used(demo: superllama.Model) -> None:
    with superllama.Context(demo, n_ctx=131072, paged_kv=True, flash_attn="on") as ctx:
        ctx.decode(ctx.model.tokenize(PROMPT))
        pages = ctx.kv_pages()
    assert pages.paged
    assert pages.pages_cpu == 1
    assert pages.resident_bytes <= 2 * pages.page_bytes


def test_the_standard_cache_says_why(tiny_model: Path) -> None:
    with superllama.Context(tiny_model) as plain:
        assert plain.kv_pages().reason == "not asked for"
    with superllama.Context(tiny_model, paged_kv=True, flash_attn="off") as ctx:
        pages = ctx.kv_pages()
    assert not pages.paged
    assert pages.reason


def test_a_budget_that_cannot_work(demo: superllama.Model) -> None:
    with pytest.raises(superllama.Error, match=r"at least \d+"):
        superllama.Context(demo, n_ctx=4096, paged_kv=True, flash_attn="on", kv_budget="1MiB")


@pytest.mark.parametrize("bad", ["5 apples", "-1", "101%"])
def test_a_size_that_is_none(bad: str) -> None:
    with pytest.raises(ValueError, match="kv_budget"):
        superllama.ContextParams(kv_budget=bad)
