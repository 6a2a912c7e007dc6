"""The metrics line: names and order of the contract, the committed schema, and what the library writes."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import superllama
from superllama._metrics import SCHEMA_FILE, DeviceMetrics, Metrics, SequenceMetrics, schema_text
from superllama._native import ffi, lib

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
    threads core_wait_ms throttled_ms expert_device_hits expert_device_misses expert_host_computed
    weight_bytes_ahead expert_device_guesses expert_device_guesses_used
    experts sequences devices
""".split()  # noqa: SIM905

PARTS = ("memory_by_tag", "experts", "sequences", "devices")

SCHEMA = json.loads(SCHEMA_FILE.read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


def line(**changes: object) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(CONTRACT, 0)
    values |= {"memory_by_tag": {"kv": 0}, "experts": None}
    values["sequences"] = [dict.fromkeys(SequenceMetrics.model_fields, 0)]
    values["devices"] = [{"device": "GPU0"} | {name: 0 for name in DeviceMetrics.model_fields if name != "device"}]
    return {**values, "timestamp": "2026-11-21T03:37:16.030Z", "event": "periodic", **changes}


def test_names_and_order_are_the_contract() -> None:
    assert list(Metrics.model_fields) == CONTRACT


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run python -m superllama._metrics"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@given(
    st.sampled_from([n for n in CONTRACT if n not in ("timestamp", "event", *PARTS)]),
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
        {"sequences": {}},
        {"sequences": [{"sequence": 0}]},
        {"devices": [{"device": 0}]},
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
    assert c_names == [name for name in CONTRACT if name not in ("event", "experts", "sequences", "devices")]
    parts = {"superllama_seq_stats": (SequenceMetrics, "sequence"), "superllama_device": (DeviceMetrics, "device")}
    for c_name, (model, key) in parts.items():
        fields = [key if name == "name" else name for name, _ in ffi.typeof(f"struct {c_name}").fields]
        assert [key, *(name for name in fields if name != key)] == list(model.model_fields)


def test_a_context_counts_its_tokens(ctx: superllama.Context) -> None:
    list(ctx.generate("the one", max_tokens=5, temperature=0, ignore_eos=True))
    n_prompt = len(ctx.model.tokenize("the one"))
    metrics = ctx.metrics()
    assert metrics.prompt_tokens == n_prompt
    assert metrics.generated_tokens == 4  # the fifth was sampled, but not computed further
    assert metrics.token == n_prompt + 4
    assert metrics.cpu_layers_active == ctx.model.n_layer
    assert metrics.ram_used_mb > 0


def decoded(ctx: superllama.Context, *tokens: tuple[int, tuple[int, ...], bool]) -> int:
    """What llama_decode() says of a batch: each token's position, sequences, and whether its logits are asked for."""
    batch = lib.llama_batch_init(len(tokens), 0, ctx.n_seq_max)
    try:
        for i, (pos, sequences, output) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = 5 + i % 7, pos, output
            batch.n_seq_id[i] = len(sequences)
            for j, seq in enumerate(sequences):
                batch.seq_id[i][j] = seq
        batch.n_tokens = len(tokens)
        with ctx._use() as c:
            return int(lib.llama_decode(c, batch))
    finally:
        lib.llama_batch_free(batch)


def counted(ctx: superllama.Context) -> list[tuple[int, int, int]]:
    """Of each sequence: tokens of prompts, generated ones, and how long it is."""
    return [(s.prompt_tokens, s.generated_tokens, s.kv_tokens) for s in ctx.sequences()]


def test_sequences_of_one_batch_are_told_apart(tiny_model: Path) -> None:
    with superllama.Context(tiny_model, n_ctx=512, n_seq_max=5, kv_unified=True) as ctx:
        prompts = [(0, (0,), False), (1, (0,), False), (2, (0,), True), (0, (1,), False), (1, (1,), True)]
        assert decoded(ctx, *prompts, (0, (3, 2), False), (1, (2, 3), True)) == 0
        assert counted(ctx) == [(3, 0, 3), (2, 0, 2), (2, 0, 2), (0, 0, 2), (0, 0, 0)]  # a shared one is computed once
        # one token with logits is generated; one without is of a prompt, and so are two of a sequence
        assert decoded(ctx, (3, (0,), True), (2, (1,), False), (2, (2,), False), (3, (2,), True)) == 0
        assert counted(ctx) == [(3, 1, 4), (3, 0, 3), (4, 0, 4), (0, 0, 2), (0, 0, 0)]
        metrics = ctx.metrics()
        assert (metrics.prompt_tokens, metrics.generated_tokens) == (10, 1)
        assert [s.sequence for s in metrics.sequences] == [0, 1, 2, 3]
        assert metrics.sequences == ctx.sequences()[:4]


def test_a_sequence_that_is_removed_and_used_again_goes_on_counting(tiny_model: Path) -> None:
    with superllama.Context(tiny_model, n_ctx=512, n_seq_max=2) as ctx:
        for n in range(1, 20):
            ctx.decode([5, 6, 7], seq=1)
            ctx.decode([8], seq=1)
            assert counted(ctx) == [(0, 0, 0), (3 * n, n, 4)]
            ctx.seq_remove(1, begin=2)
            assert counted(ctx)[1] == (3 * n, n, 2)
            ctx.seq_copy(1, 0)
            assert [length for *_, length in counted(ctx)] == [2, 2]
            ctx.clear()
            assert counted(ctx) == [(0, 0, 0), (3 * n, n, 0)]
        assert [s.sequence for s in ctx.metrics().sequences] == [1]


def test_what_failed_is_not_counted(tiny_model: Path) -> None:
    with superllama.Context(tiny_model, n_ctx=256, n_batch=512, n_ubatch=32, n_seq_max=1, n_threads=1) as ctx:
        assert decoded(ctx, *((i, (0,), False) for i in range(200))) == 0
        assert decoded(ctx, *((i, (0,), False) for i in range(200, 300))) == 1  # there are no cells for it
        assert decoded(ctx, (207, (0,), True), (203, (0,), True)) < 0  # positions go on
        assert counted(ctx) == [(200, 0, 200)] and ctx.metrics().token == 200
        ctx.clear()

        stats = ffi.new("struct superllama_stats *")

        @ffi.callback("bool(void *)")
        def after_two_ubatches(_: object) -> bool:
            lib.superllama_stats(ctx._c, stats)
            return bool(stats.token == 264)

        lib.llama_set_abort_callback(ctx._c, after_two_ubatches, ffi.NULL)
        assert decoded(ctx, *((i, (0,), False) for i in range(100))) == 2
        assert counted(ctx) == [(264, 0, 64)]  # what was computed before stays
        assert ctx.metrics().sequences == ctx.sequences() and ctx.metrics().token == 264
        lib.llama_set_abort_callback(ctx._c, ffi.NULL, ffi.NULL)
        assert decoded(ctx, *((i, (0,), i == 99) for i in range(64, 100))) == 0
        assert counted(ctx) == [(300, 0, 100)]


def test_other_threads_read_while_one_decodes(tiny_model: Path) -> None:
    with superllama.Context(tiny_model, n_ctx=512, n_seq_max=4) as ctx:
        done = threading.Event()
        wrong: list[object] = []
        n_seen = 0

        def read() -> None:
            nonlocal n_seen
            before: dict[int, SequenceMetrics] = {}
            while not done.is_set():
                for now in ctx.metrics().sequences:
                    last = before.get(now.sequence, now)
                    if now.generated_tokens < last.generated_tokens or not 0 <= now.kv_tokens <= 30:
                        wrong.append((last, now))
                    before[now.sequence] = now
                    n_seen += 1

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(20):
                for i in range(30):
                    assert decoded(ctx, *((i, (seq,), True) for seq in range(4))) == 0
                ctx.clear()
        finally:
            done.set()
            reader.join()
        assert not wrong and n_seen > 0
        assert counted(ctx) == [(0, 600, 0)] * 4


def test_the_last_line_of_a_file_tells_what_was_removed(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    with superllama.Context(tiny_model, n_ctx=512, n_seq_max=2, metrics_file=file, metrics_interval_ms=0) as ctx:
        ctx.decode([5, 6, 7], seq=1)
        ctx.seq_remove(1)
    first, last = (json.loads(text)["sequences"] for text in file.read_text().splitlines())
    assert [(s["sequence"], s["prompt_tokens"], s["kv_tokens"]) for s in (*first, *last)] == [(1, 3, 3), (1, 3, 0)]


def test_an_encoder_has_sequences_without_a_cache(tiny_bert: Path) -> None:
    with superllama.Context(tiny_bert, embeddings=True, n_seq_max=2) as ctx:
        ctx.embed(["the one", "a"])
        assert sum(s.prompt_tokens + s.generated_tokens for s in ctx.sequences()) == ctx.metrics().token > 0
        assert all(s.kv_tokens == s.kv_bytes == 0 for s in ctx.sequences())


def test_sequences_add_up_to_the_context(tiny_model: Path) -> None:
    with superllama.Context(tiny_model, n_ctx=512, n_seq_max=3) as ctx:
        assert ctx.metrics().sequences == []
        list(ctx.generate("the one", seq=0, max_tokens=5, temperature=0, ignore_eos=True))
        list(ctx.generate("a one", seq=2, max_tokens=3, temperature=0, ignore_eos=True))
        metrics = ctx.metrics()
        first, last = metrics.sequences
        assert (first.sequence, first.generated_tokens) == (0, 4) and (last.sequence, last.generated_tokens) == (2, 2)
        assert first.prompt_tokens == len(ctx.model.tokenize("the one"))
        assert first.kv_tokens == first.prompt_tokens + 4
        for name in ("prompt_tokens", "generated_tokens"):
            assert sum(getattr(s, name) for s in metrics.sequences) == getattr(metrics, name)
        assert [s.prompt_tokens for s in ctx.sequences()] == [first.prompt_tokens, 0, last.prompt_tokens]
        ctx.seq_remove(0)
        assert ctx.sequences()[0] == first.model_copy(update={"kv_tokens": 0})  # what it did stays
        assert ctx.metrics().sequences == [ctx.sequences()[0], last]


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
