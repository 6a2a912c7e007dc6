"""Parts of C parameter structs that are more than a number: enums by name, lists, and texts they point to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._errors import ModelError
from ._memory import devices
from ._native import ffi, lib, text


def _enum(prefix: str, **names: str) -> dict[str, int]:
    return {name: getattr(lib, prefix + suffix) for name, suffix in names.items()}


_CACHE_TYPES = {
    text(lib.ggml_type_name(t)): t
    for t in (
        lib.GGML_TYPE_F32,
        lib.GGML_TYPE_F16,
        lib.GGML_TYPE_BF16,
        lib.GGML_TYPE_Q8_0,
        lib.GGML_TYPE_Q4_0,
        lib.GGML_TYPE_Q4_1,
        lib.GGML_TYPE_IQ4_NL,
        lib.GGML_TYPE_Q5_0,
        lib.GGML_TYPE_Q5_1,
    )
}

# of a parameter: the names that llama.cpp's flags use -> C constants; "model" = the model's own
ENUMS: dict[str, dict[str, int]] = {
    "split_mode": _enum("LLAMA_SPLIT_MODE_", none="NONE", layer="LAYER", row="ROW", tensor="TENSOR"),
    "load_mode": {
        text(lib.llama_load_mode_name(mode)): mode
        for mode in (
            lib.LLAMA_LOAD_MODE_AUTO,
            lib.LLAMA_LOAD_MODE_NONE,
            lib.LLAMA_LOAD_MODE_MMAP,
            lib.LLAMA_LOAD_MODE_MLOCK,
            lib.LLAMA_LOAD_MODE_MMAP_MLOCK,
            lib.LLAMA_LOAD_MODE_DIRECT_IO,
        )
    },
    "lazy_mode": _enum("LLAMA_LAZY_MODE_", off="OFF", auto="AUTO", on="ON"),
    "layer_policy": _enum("SUPERLLAMA_LAYER_POLICY_", pin="PIN", lru="LRU"),
    "expert_misses": _enum("SUPERLLAMA_EXPERT_MISSES_", send="SEND", share="SHARE"),
    "adapt_threads": _enum("SUPERLLAMA_ADAPT_THREADS_", exact="EXACT", on="ON", off="OFF"),
    "rope_scaling": _enum(
        "LLAMA_ROPE_SCALING_TYPE_", model="UNSPECIFIED", none="NONE", linear="LINEAR", yarn="YARN", longrope="LONGROPE"
    ),
    "pooling": _enum(
        "LLAMA_POOLING_TYPE_", model="UNSPECIFIED", none="NONE", mean="MEAN", cls="CLS", last="LAST", rank="RANK"
    ),
    "attention": _enum("LLAMA_ATTENTION_TYPE_", model="UNSPECIFIED", causal="CAUSAL", **{"non-causal": "NON_CAUSAL"}),
    "flash_attn": _enum("LLAMA_FLASH_ATTN_TYPE_", auto="AUTO", on="ENABLED", off="DISABLED"),
    "type_k": _CACHE_TYPES,
    "type_v": _CACHE_TYPES,
}


def device_list(names: Sequence[str] | None, owned: list[Any]) -> Any:
    """A NULL-terminated list of devices; NULL for None, which means all.

    Raises: ModelError for a name that no device has.
    """
    if names is None:
        return ffi.NULL
    found = [lib.ggml_backend_dev_by_name(name.encode()) for name in names]
    for name, dev in zip(names, found, strict=True):
        if not dev:
            raise ModelError(f"devices: there is no {name!r}; there are {[d.name for d in devices()]}")
    owned.append(ffi.new("ggml_backend_dev_t[]", [*found, ffi.NULL]))
    return owned[-1]


def buffer_type_overrides(patterns: Mapping[str, str], owned: list[Any]) -> Any:
    """A NULL-terminated list of (regular expression, buffer type); NULL if there are none.

    Raises: ModelError for a buffer type that no device has.
    """
    if not patterns:
        return ffi.NULL
    known = {}
    for i in range(lib.ggml_backend_dev_count()):
        buft = lib.ggml_backend_dev_buffer_type(lib.ggml_backend_dev_get(i))
        known[text(lib.ggml_backend_buft_name(buft))] = buft
    overrides = ffi.new("struct llama_model_tensor_buft_override[]", len(patterns) + 1)
    owned.append(overrides)
    for override, (pattern, name) in zip(overrides, patterns.items(), strict=False):
        if name not in known:
            raise ModelError(f"override_tensor: there is no buffer type {name!r}; there are {sorted(known)}")
        owned.append(ffi.new("char[]", pattern.encode()))
        override.pattern, override.buft = owned[-1], known[name]
    return overrides


def float_list(values: Sequence[float] | None, n: int, owned: list[Any]) -> Any:
    """An array of `n` floats, the rest 0; NULL for None."""
    if values is None:
        return ffi.NULL
    owned.append(ffi.new("float[]", [*values, *[0.0] * (n - len(values))]))
    return owned[-1]


def kv_override_list(values: Mapping[str, bool | int | float | str], owned: list[Any]) -> Any:
    """A list of metadata overrides, ended by one with an empty key; NULL if there are none.

    Raises: ModelError for a text that is too long.
    """
    if not values:
        return ffi.NULL
    overrides = ffi.new("struct llama_model_kv_override[]", len(values) + 1)
    owned.append(overrides)
    for override, (key, value) in zip(overrides, values.items(), strict=False):
        if max(len(key.encode()), len(value.encode()) if isinstance(value, str) else 0) > 127:
            raise ModelError(f"override_kv: {key!r} or its value is longer than the 127 bytes that the library takes")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ModelError(f"override_kv: {key!r} is {value}, which does not fit into 64 bits")
        override.key = key.encode()
        if isinstance(value, bool):
            override.tag, override.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            override.tag, override.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            override.tag, override.val_f64 = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            override.tag, override.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return overrides
