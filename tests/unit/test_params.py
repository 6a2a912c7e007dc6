"""Parameters: nothing of the C structs is forgotten, defaults are the library's, wrong values name the field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import superllama
from superllama import ContextParams, ModelParams, SamplingParams
from superllama._c_params import ENUMS
from superllama._native import ffi, lib
from superllama._params import LEFT_OUT, RENAMED, merged


def c_fields(struct: str) -> set[str]:
    """The members of a C struct, those of a nested `superllama` struct included."""
    names: set[str] = set()
    for name, field in ffi.typeof(struct).fields:
        names.add(name)
        if name == "superllama":
            names |= {nested for nested, _ in field.type.fields}
    return names


def ours(kind: type[ModelParams] | type[ContextParams]) -> set[str]:
    return {RENAMED.get(name, name) for name in kind.model_fields}


@pytest.mark.parametrize(
    ("kind", "struct"), [(ModelParams, "struct llama_model_params"), (ContextParams, "struct llama_context_params")]
)
def test_every_c_field_is_mapped_or_left_out(kind: type[Any], struct: str) -> None:
    fields = c_fields(struct)
    assert fields - ours(kind) - set(LEFT_OUT) == set()
    assert ours(kind) - fields == set()
    assert not ours(kind) & set(LEFT_OUT)


def test_what_is_left_out_exists() -> None:
    fields = c_fields("struct llama_model_params") | c_fields("struct llama_context_params")
    assert set(LEFT_OUT) <= fields


def as_dict(struct: Any) -> dict[str, Any]:
    values = {name: getattr(struct, name) for name, _ in ffi.typeof(struct).fields}
    values |= {n: list(v) for n, v in values.items() if isinstance(v, ffi.CData) and ffi.typeof(v).kind == "array"}
    if "superllama" in values:
        values |= as_dict(values.pop("superllama"))
    return values


def test_defaults_are_the_librarys() -> None:
    assert as_dict(ModelParams().to_c([])) == as_dict(lib.llama_model_default_params())
    library = as_dict(lib.llama_context_default_params())
    # the three that depend on the model and the machine
    c = ContextParams().to_c([], n_ctx=library["n_ctx"], n_threads=library["n_threads"])
    assert as_dict(c) == library


def test_values_arrive_in_the_struct() -> None:
    owned: list[Any] = []
    params = ContextParams(
        n_threads=3, flash_attn="on", type_k="q8_0", pooling="mean", yarn_orig_ctx=7, metrics=True, metrics_file="/x/é"
    )
    c = params.to_c(owned, n_ctx=77, n_threads=9)
    assert (c.n_ctx, c.n_threads, c.n_threads_batch, c.yarn_orig_ctx) == (77, 3, 3, 7)
    assert c.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert c.type_k == lib.GGML_TYPE_Q8_0
    assert c.pooling_type == lib.LLAMA_POOLING_TYPE_MEAN
    assert c.superllama.metrics
    assert ffi.string(c.superllama.metrics_file).decode() == "/x/é"

    m = ModelParams(
        devices=["CPU"],
        tensor_split=[1, 2.5],
        override_tensor={"ffn": "CPU"},
        override_kv={"a": True, "b": 3, "c": 1.5, "d": "s"},
    ).to_c(owned)
    assert ffi.string(lib.ggml_backend_dev_name(m.devices[0])) == b"CPU"
    assert m.devices[1] == ffi.NULL
    assert [m.tensor_split[i] for i in range(3)] == [1, 2.5, 0]
    assert ffi.string(m.tensor_buft_overrides[0].pattern) == b"ffn"
    assert m.tensor_buft_overrides[1].pattern == ffi.NULL
    kv = m.kv_overrides
    assert [kv[0].val_bool, kv[1].val_i64, kv[2].val_f64, ffi.string(kv[3].val_str)] == [True, 3, 1.5, b"s"]
    assert [kv[i].tag for i in range(4)] == [
        lib.LLAMA_KV_OVERRIDE_TYPE_BOOL,
        lib.LLAMA_KV_OVERRIDE_TYPE_INT,
        lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT,
        lib.LLAMA_KV_OVERRIDE_TYPE_STR,
    ]
    assert ffi.string(kv[4].key) == b""


@pytest.mark.parametrize("name", sorted(ENUMS))
def test_enum_names_are_those_the_models_accept(name: str) -> None:
    kind = ModelParams if name in ModelParams.model_fields else ContextParams
    for value in ENUMS[name]:
        assert getattr(kind(**{name: value}), name) == value
    schema = kind.model_json_schema()["properties"][name]
    assert set(schema["enum"]) == set(ENUMS[name])


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ContextParams, "n_ctx", -1),
        (ContextParams, "n_ctx", 2**32),
        (ContextParams, "n_ctx", "many"),
        (ContextParams, "n_batch", 0),
        (ContextParams, "n_seq_max", 0),
        (ContextParams, "n_seq_max", lib.llama_max_parallel_sequences() + 1),
        (ContextParams, "n_threads", 0),
        (ContextParams, "flash_attn", "perhaps"),
        (ContextParams, "type_k", "q3_k"),
        (ContextParams, "rope_freq_base", float("nan")),
        (ContextParams, "metrics_interval_ms", -1),
        (ContextParams, "paged", True),
        (ModelParams, "n_gpu_layers", -2),
        (ModelParams, "split_mode", "diagonal"),
        (ModelParams, "tensor_split", [-1.0]),
        (ModelParams, "tensor_split", [1.0] * (lib.llama_max_devices() + 1)),
        (ModelParams, "layer_policy", "random"),
        (ModelParams, "mem_pressure", 1.5),
        (ModelParams, "mem_pressure_low", 0.9),
        (ModelParams, "mem_budget", "8 parsecs"),
        (ModelParams, "mem_budget", "101%"),
        (ModelParams, "mem_budget", "8GiB\0"),
        (ModelParams, "mem_budget", "\ud800"),
        (ModelParams, "mem_budget", 0),
        (ModelParams, "mem_budget", -1),
        (ModelParams, "mem_budget", True),
        (ModelParams, "mem_budget", 2**64),
        (ModelParams, "mem_budget", None),
        (SamplingParams, "temperature", -0.1),
        (SamplingParams, "top_p", 1.1),
        (SamplingParams, "max_tokens", -1),
        (SamplingParams, "seed", 2**32),
        (SamplingParams, "stop", [""]),
        (SamplingParams, "grammar", "root ::= \0"),
        (SamplingParams, "repeat_penalty", 0),
        (SamplingParams, "logit_bias", {-1: 1.0}),
    ],
)
def test_wrong_values_name_the_field(kind: type[Any], name: str, value: object) -> None:
    with pytest.raises(ValidationError) as e:
        kind(**{name: value})
    assert e.value.errors()[0]["loc"][0] == name


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("auto", 0),
        (123456, 123456),
        ("123456", 123456),
        ("8GiB", 8 << 30),
        ("1.5MB", 1_500_000),
        ("512 MiB", 512 << 20),
    ],
)
def test_budgets(text: int | str, n_bytes: int) -> None:
    assert ModelParams(mem_budget=text).to_c([]).superllama.mem_budget_bytes == n_bytes


def test_a_budget_may_be_a_part_of_memory() -> None:
    n_bytes = ModelParams(mem_budget="50%").to_c([]).superllama.mem_budget_bytes
    assert n_bytes == pytest.approx(superllama.memory().host_total / 2, rel=0.01)


def test_the_low_mark_is_below_the_high_one() -> None:
    assert ModelParams(mem_pressure=0.5, mem_pressure_low=0.4).mem_pressure_low == 0.4
    with pytest.raises(ValidationError, match=r"mem_pressure_low\n.*0\.7; it must be below mem_pressure"):
        ModelParams(mem_pressure=0.5)


def test_params_cannot_be_changed_behind_a_context() -> None:
    with pytest.raises(ValidationError):
        ContextParams().n_ctx = 5  # type: ignore[misc]


def test_keywords_win_over_params() -> None:
    base = SamplingParams(top_k=5, temperature=0.3)
    assert merged(SamplingParams, base, {"temperature": 0}) == SamplingParams(top_k=5, temperature=0)
    assert merged(SamplingParams, base, {}) is base
    with pytest.raises(ValidationError, match="top_kk"):
        merged(SamplingParams, base, {"top_kk": 1})


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"devices": ["Imaginary0"]}, "Imaginary0.*CPU"),
        ({"override_tensor": {"x": "Imaginary"}}, "Imaginary.*CPU"),
        ({"override_kv": {"k" * 128: 1}}, "127 bytes"),
        ({"override_kv": {"k": 2**63}}, "64 bits"),
    ],
)
def test_names_that_the_library_does_not_know(params: dict[str, Any], text: str) -> None:
    with pytest.raises(superllama.ModelError, match=text):
        ModelParams(**params).to_c([])
