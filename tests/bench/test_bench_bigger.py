"""The bound of bigger_than_memory.py, and what of it was reached, from runs made by hand."""

import numpy as np
import pytest
from bench import bigger_report, engine
from bench.trace.tensors import TensorMap

DENSE = TensorMap(
    np.array([0, 100, 1100]),
    ["token_embd.weight", "blk.0.ffn_down.weight"],
    np.array([-1, 0]),
    np.array([-1, -1]),
)
MOE = TensorMap(
    np.array([0, 100, 600, 1100]),
    ["token_embd.weight", "blk.0.ffn_down_exps.weight", "blk.0.ffn_down_exps.weight"],
    np.array([-1, 0, 0]),
    np.array([-1, 0, 1]),
)


def a_run(key: str, name: str, budget: int | None, decode: float, **more) -> dict:
    return {"key": key, "scenario": "baseline" if budget is None else "half", "engine": name, "read_ahead_kb": None,
            "budget_bytes": budget, "status": "ok", "error": "", "peak_bytes": None, "tokens": 4, "hash": "0",
            "decode_tokens_per_s": decode, "prompt_tokens_per_s": 1.0, "first_token_s": 1.0, "decode_read_bytes": 0,
            "total_read_bytes": 0, "metrics": None} | more  # fmt: skip


def speeds(key: str, *bytes_per_s: float) -> list[dict]:
    return [{"run": key, "bytes_per_s": b} for b in bytes_per_s]


def test_each_run_has_the_disk_it_met():
    """B doubles between two runs, and so does what they do: both reached the same."""
    runs = [
        a_run("none", "superllama", None, 10.0),
        a_run("slow", "superllama", 600, 0.9),
        a_run("fast", "superllama", 600, 1.8),
    ]
    measured = [*speeds("none", 1.0), *speeds("slow", 300, 500), *speeds("fast", 700, 900)]
    with_limit = bigger_report.rows_of(runs, DENSE, measured)[1]
    assert with_limit.bytes_per_s == 600
    assert with_limit.bound == pytest.approx((400 / 400 + 800 / 400) / 2)
    assert with_limit.reached == pytest.approx(0.9)
    assert with_limit.reached_of_file == pytest.approx(0.9 * 500 / 400)  # the embedding is read by rows


def test_compute_is_of_the_same_kernels():
    runs = [
        a_run("n", "superllama", None, 2.0),
        a_run("nr", "superllama-repack", None, 4.0),
        a_run("h", "superllama", 1090, 2.0),
        a_run("hr", "superllama-repack", 1090, 2.0),
    ]
    measured = [m for r in runs for m in speeds(r["key"], 1e6)]
    reached = {r.engine: r.reached for r in bigger_report.rows_of(runs, DENSE, measured) if r.budget_bytes}
    assert reached == {"superllama": pytest.approx(1.0), "superllama-repack": pytest.approx(0.5)}


def test_the_floor_of_experts_leaves_wrong_guesses_out():
    metrics = {"expert_misses": 6, "expert_guesses": 4, "expert_guesses_used": 2}  # 10 reads, 8 of them right
    runs = [
        a_run("n", "superllama", None, 100.0),
        a_run("h", "superllama", 600, 0.5, decode_read_bytes=4000, total_read_bytes=5100, metrics=metrics),
    ]
    row = bigger_report.rows_of(runs, MOE, [*speeds("n", 1.0), *speeds("h", 800)])[1]
    assert row.bound == pytest.approx(800 / (0.8 * 4000 / 4))
    assert row.reached == pytest.approx(0.5)
    assert row.bytes_to_misses == pytest.approx(5100 / (10 * 500))


def test_repacked_blocks_are_read_from_their_file(tmp_path):
    model = tmp_path / "m.gguf"
    repacked, plain, stock = (engine.get(n) for n in ("superllama-repack", "superllama", "stock-default"))
    assert repacked.file(model) == model  # not written yet
    blocks = tmp_path / "m.cache/repacked/0123.blocks"
    blocks.parent.mkdir(parents=True)
    blocks.touch()
    assert repacked.file(model) == blocks
    assert plain.file(model) == stock.file(model) == model
