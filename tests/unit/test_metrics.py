"""The metrics line: names and order of the contract, the committed schema, and what the library writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import superllama
from superllama._metrics import SCHEMA_FILE, Metrics, schema_text
from superllama._native import ffi

CONTRACT = """
    timestamp token prompt_tokens generated_tokens
    gpu_layers_active cpu_layers_active layers_evicted layers_loaded
    kv_pages_gpu kv_pages_cpu kv_pages_evicted kv_pages_prefetched
    vram_used_mb vram_total_mb ram_used_mb gpu_memory_pressure cpu_memory_pressure
    tokens_per_sec avg_tokens_per_sec prefetch_pending prefetch_completed prefetch_failed
    event
    disk_layers_active kv_pages_disk weight_bytes_resident weight_bytes_read kv_bytes_read
    kv_bytes_written stall_ms expert_hits expert_misses mem_budget_bytes mem_peak_bytes metrics_dropped
    vram_own_bytes vram_budget_bytes move_ms expert_guesses expert_guesses_used memory_by_tag
    threads core_wait_ms throttled_ms experts
""".split()  # noqa: SIM905

SCHEMA = json.loads(SCHEMA_FILE.read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


def line(**changes: object) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(CONTRACT, 0)
    values |= {"memory_by_tag": {"kv": 0}, "experts": None}
    return {**values, "timestamp": "2026-11-21T03:37:16.030Z", "event": "periodic", **changes}


def test_names_and_order_are_the_contract() -> None:
    assert list(Metrics.model_fields) == CONTRACT


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run python -m superllama._metrics"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@given(
    st.sampled_from([n for n in CONTRACT if n not in ("timestamp", "event", "memory_by_tag", "experts")]),
    st.floats(allow_nan=False) | st.integers(),
)
def test_schema_and_model_agree(name: str, value: float) -> None:
    candidate = line(**{name: value})
    try:
        Metrics.model_validate(candidate)
        accepted = True
    except ValidationError:
        accepted = False
    if math.isinf(value) or abs(value) >= 2**63:
        return  # JSON has no infinity, the library no such integers
    assert VALIDATOR.is_valid(candidate) == accepted


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": -1},
        {"token": 1.5},
        {"token": "1"},
        {"gpu_memory_pressure": 1.1},
        {"event": "lunch"},
        {"memory_by_tag": {"kv": -1}},
        {"memory_by_tag": 1},
        {"experts": 1},
        {"experts": {"layers": [0], "uses": [[1]], "misses": [[0]], "tier": [[3]]}},
        {"extra": 1},
    ],
)
def test_schema_refuses(wrong: dict[str, object]) -> None:
    assert VALIDATOR.is_valid(line())
    assert not VALIDATOR.is_valid(line(**wrong))


@pytest.mark.parametrize("name", CONTRACT)
def test_every_field_is_required(name: str) -> None:
    candidate = line()
    del candidate[name]
    assert not VALIDATOR.is_valid(candidate)
    with pytest.raises(ValidationError, match=name):
        Metrics.model_validate(candidate)


def test_every_number_of_the_c_struct_is_in_the_line() -> None:
    def shown(name: str) -> str:
        return {"timestamp_ms": "timestamp"}.get(
            name, name.replace("_used_bytes", "_used_mb").replace("_total_bytes", "_total_mb")
        )

    c_names = [shown(name) for name, _ in ffi.typeof("struct superllama_stats").fields]
    assert c_names == [name for name in CONTRACT if name not in ("event", "experts")]


def test_a_context_counts_its_tokens(ctx: superllama.Context) -> None:
    list(ctx.generate("the one", max_tokens=5, temperature=0, ignore_eos=True))
    n_prompt = len(ctx.model.tokenize("the one"))
    metrics = ctx.metrics()
    assert metrics.prompt_tokens == n_prompt
    assert metrics.generated_tokens == 4  # the fifth was sampled, but not computed further
    assert metrics.token == n_prompt + 4
    assert metrics.cpu_layers_active == ctx.model.n_layer
    assert metrics.ram_used_mb > 0


def test_the_file_has_valid_lines_and_ends_with_final(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    with superllama.Context(tiny_model, n_ctx=512, metrics_file=file, metrics_interval_ms=0) as ctx:
        list(ctx.generate("the", max_tokens=3, temperature=0, ignore_eos=True))
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    for one in lines:
        VALIDATOR.validate(one)
        assert list(one) == CONTRACT
    assert [one["event"] for one in lines] == ["periodic"] * (len(lines) - 1) + ["final"]
    assert len(lines) == 4  # three batches and the end
    assert lines[-1]["generated_tokens"] == 2


def test_an_unwritable_file_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(superllama.ContextError, match="no/such/folder"):
        superllama.Context(tiny_model, metrics_file=tmp_path / "no/such/folder/m.jsonl")
