"""What a server keeps beside its slots lies in the model's budget: kept prompts make room before they pass it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from dynamic import MIB, layout
from serving import http_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

N_PROMPTS, WORDS = 12, 500
CONTEXT = {"n_ctx": 2048, "n_ubatch": 128, "n_batch": 512, "n_threads": 2}


def prompt(i: int) -> str:
    return " ".join(f"{(i * 7919 + k * 104729) % 9973}" for k in range(WORDS // 4))


def test_kept_prompts_go_where_the_budget_shrinks(demo_model: Path, tmp_path: Path) -> None:
    plan = layout(demo_model, CONTEXT, dynamic_layers=True, use_extra_bufts=False)
    budget, least = plan.mem_full_bytes + 64 * MIB, plan.mem_least_bytes + 8 * MIB
    flags = ["--mem-budget", budget, "--no-repack", "-np", 1, "-c", 2048, "-ub", 128, "-b", 512, "-t", 2]
    with http_server(demo_model, tmp_path / "log", *flags) as server:
        texts = [server.complete(prompt(i), n_predict=4)["content"] for i in range(4)]
        kept = server.request("/superllama")[1]["metrics"]["memory_by_tag"]["prompt_cache"]
        assert kept > 8 * MIB  # more than would be left beside the weights
        status, found = server.request("/superllama/budget", {"mem_budget": least})
        assert status == 200 and found["memory_used_bytes"] <= least
        assert found["metrics"]["memory_by_tag"]["prompt_cache"] < kept
        assert server.complete(prompt(0), n_predict=4)["content"] == texts[0]


def anonymous(pid: int) -> int:
    line = next(t for t in Path(f"/proc/{pid}/status").read_text().splitlines() if t.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_kept_prompts_stay_in_the_budget(demo_model: Path, tmp_path: Path) -> None:
    plan = layout(demo_model, CONTEXT, dynamic_layers=True, use_extra_bufts=False)
    budget = (plan.mem_least_bytes + plan.mem_full_bytes) // 2
    metrics = tmp_path / "metrics.jsonl"
    flags = ["--mem-budget", budget, "--no-repack", "-np", 1, "-c", 2048, "-ub", 128, "-b", 512, "-t", 2]
    flags += ["--metrics-file", metrics, "--metrics-interval", 0, "--cache-ram", 8192]
    with http_server(demo_model, tmp_path / "log", *flags) as server:
        texts, peaks = [], []
        for _ in range(2):
            for i in range(N_PROMPTS):
                texts.append(server.complete(prompt(i), n_predict=4)["content"])
                peaks.append(anonymous(server.process.pid))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [line["memory_by_tag"]["prompt_cache"] for line in lines]
    assert max(kept) > 4 * MIB
    for line in lines:
        assert sum(line["memory_by_tag"].values()) <= line["mem_budget_bytes"]
    assert max(peaks) <= budget + 64 * MIB  # the process: vocabulary, graphs, the server itself
    assert texts[:N_PROMPTS] == texts[N_PROMPTS:]
