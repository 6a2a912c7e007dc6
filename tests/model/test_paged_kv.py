"""The paged KV cache from Python: the same text within a small budget, and what it says of itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rpc_devices import rpc_server
from running import Runner

import superllama
from superllama._programs import find_program

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
        held, pages, metrics = paged.sequences(), paged.kv_pages(), paged.metrics()
    assert found == expected
    assert pages.paged
    assert pages.restored > 0
    assert pages.prefetched_used > 0
    assert pages.resident_peak_bytes <= pages.budget_bytes
    assert metrics.kv_pages_evicted == pages.evicted_clean + pages.evicted_dirty > 0
    assert metrics.kv_bytes_read == pages.bytes_read > 0
    assert len(pages.sequences) == 8
    assert all(s.tokens > 60 for s in pages.sequences)
    assert metrics.sequences == held
    assert [s.kv_tokens for s in held] == [s.tokens for s in pages.sequences]
    assert sum(s.kv_pages_cpu for s in held) == metrics.kv_pages_cpu == pages.pages_cpu
    assert sum(s.kv_pages_disk for s in held) == metrics.kv_pages_disk == pages.pages_disk > 0
    assert sum(s.kv_bytes for s in held) == sum(s.resident_bytes for s in pages.sequences) == pages.resident_bytes > 0


def test_sixteen_conversations_in_the_budget_of_three(demo: superllama.Model, tmp_path: Path) -> None:
    n, prompt, answer, page = 16, 100, 10, 32
    options = {"n_ctx": n * 256, "n_seq_max": n, "n_threads": 2, "flash_attn": "on"}
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, demo.n_vocab, (n, prompt)).tolist()

    def talk(ctx: superllama.Context, after_each: Callable[[], None]) -> list[list[int]]:
        """Every conversation answers, is left alone, and goes on in a second round."""
        answers = []
        for tokens in [*prompts, *([1] for _ in range(n))]:
            seq, said = len(answers) % n, []
            for _ in range(answer):
                ctx.decode(tokens, seq=seq)
                after_each()
                tokens = [int(ctx.logits()[0].argmax())]
                said += tokens
            answers.append(said)
        return answers

    with superllama.Context(demo, **options) as plain:
        expected = talk(plain, lambda: None)
    paging = {"paged_kv": True, "kv_page_size": page, "spill_dir": tmp_path}
    with superllama.Context(demo, **options, **paging) as ctx:
        page_bytes = ctx.kv_pages().page_bytes
    per_conversation = -(-(prompt + 2 * answer) // page) * page_bytes
    budget = 3 * per_conversation + (1 << 20)  # and the buffer of the spill file

    seen = []
    with superllama.Context(demo, **options, **paging, kv_budget=budget) as paged:

        def watch() -> None:
            pages = paged.kv_pages()
            assert paged.metrics().kv_pages_cpu == pages.pages_cpu
            assert pages.pages_cpu * page_bytes == pages.resident_bytes
            seen.append(pages.resident_bytes)

        assert talk(paged, watch) == expected
        pages = paged.kv_pages()
    assert len(seen) == 2 * n * answer
    assert 2 * per_conversation < max(seen) <= pages.resident_peak_bytes <= pages.budget_bytes <= budget
    assert pages.ubatches_streamed == 0
    # every conversation left and came back; at the end all but three are on disk
    assert pages.evicted_dirty >= n * (prompt // page)
    assert pages.restored >= n * (prompt // page)
    assert sum(s.pages_cpu == 0 and s.pages_disk > 0 for s in pages.sequences) >= n - 4
    assert all(s.tokens == prompt + 2 * answer - 1 for s in pages.sequences)


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


# ---------------------------------------------------------------- page sizes


@pytest.mark.parametrize("size", [15, 8193, 0, -16])
def test_page_sizes_that_there_are_not(size: int, model: superllama.Model) -> None:
    with pytest.raises(ValueError, match="kv_page_size"):
        superllama.ContextParams(kv_page_size=size)
    unchecked = superllama.ContextParams(paged_kv=True).model_copy(update={"kv_page_size": size})
    with pytest.raises(superllama.Error, match=rf"kv_page_size {size}: a page has 16 to 8192 cells"):
        superllama.Context(model, unchecked)


@pytest.mark.parametrize("size", ["15", "8193"])
@pytest.mark.parametrize("program", ["llama-completion", "llama-bench"])
def test_programs_refuse_page_sizes(program: str, size: str, tiny_model: Path) -> None:
    flags = ["--paged-kv", "--kv-page-size", size]
    done = subprocess.run([find_program(program), "-m", tiny_model, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if "--kv-page-size" in line)
    assert size in line
    assert "16 to 8192" in line
    assert "llama_model_loader" not in done.stderr  # nothing was loaded


def test_the_variable_is_checked_too(tiny_model: Path) -> None:
    env = {**os.environ, "LLAMA_ARG_KV_PAGE_SIZE": "15"}
    command = [find_program("llama-completion"), "-m", tiny_model, "--paged-kv"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert any("LLAMA_ARG_KV_PAGE_SIZE" in line and "16 to 8192" in line for line in done.stderr.splitlines())


# ---------------------------------------------------------------- layers on a device

DEVICE = """
import json, logging, sys
import numpy as np
import superllama

path, endpoint, spill, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("superllama").addHandler(handler)
superllama.add_rpc_server(endpoint)
model = superllama.Model(path, use_extra_bufts=False, **options["model"])
shared = {"n_ctx": 4 * 256, "n_seq_max": 4, "n_threads": 1, "flash_attn": "on", **options["context"]}

def run(**paging):
    rows = []
    with superllama.Context(model, **shared, **paging) as ctx:
        for i in range(8):
            ctx.decode([(7 * i + j) % 256 for j in range(100 if i < 4 else 1)], seq=i % 4)
            rows.append(ctx.logits().copy())
        return np.stack(rows), ctx.kv_pages()

expected, _ = run()
lines.clear()
found, pages = run(paged_kv=True, kv_page_size=16, kv_budget=800 << 10, spill_dir=spill)
assert np.array_equal(found, expected)
print(json.dumps({"paged": pages.paged, "reason": pages.reason, "restored": pages.restored,
                  "lines": [line for line in lines if "paged_kv: " in line]}))
"""


@pytest.mark.parametrize(
    ("model", "context", "n_device"),
    [
        ({"n_gpu_layers": 99}, {}, 4),
        ({"n_gpu_layers": 3}, {}, 2),  # one is the output
        ({"n_gpu_layers": 99}, {"offload_kqv": False}, 0),
        ({"n_gpu_layers": 0}, {}, 0),
        ({"dynamic_layers": True}, {}, 0),
        ({"dynamic_layers": True}, {"offload_kqv": False}, 0),
        ({"dynamic_layers": True, "vram_budget": 0}, {}, 0),
    ],
)
def test_a_cache_that_is_on_a_device_for_good_is_not_paged(
    model: dict[str, int], context: dict[str, bool], n_device: int, tiny_model: Path, tmp_path: Path, run_python: Runner
) -> None:
    """All results are those without pages; where the cache cannot leave a device, the log and kv_pages() say so."""
    with rpc_server() as server:
        options = json.dumps({"model": model, "context": context})
        done = run_python(DEVICE, tiny_model, server.endpoint, tmp_path, options)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    if n_device == 0:
        assert seen == {"paged": True, "reason": "", "restored": seen["restored"], "lines": []}
        follows_layers = model == {"dynamic_layers": True} and not context  # to where there is no budget for it
        assert (seen["restored"] > 0) == (not follows_layers)
        return
    reason = (
        f"{n_device} of 4 layers keep their cache on a device for good; dynamic_layers lets it come and go, "
        "offload_kqv=False keeps it in host memory"
    )
    assert (seen["paged"], seen["reason"]) == (False, reason)
    assert len(seen["lines"]) == 1
    assert f"paged_kv: standard KV cache: {reason}" in seen["lines"][0]
