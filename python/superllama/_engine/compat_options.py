"""The parameters of llama-cpp-python's Llama as options of an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .results import Chunk, Completion

_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}
_SPLIT = {0: "none", 1: "layer", 2: "row"}
_ROPE = {0: "none", 1: "linear", 2: "yarn", 3: "longrope"}
_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}

# parameter -> the value that says nothing, and the option that it is where it is not that
_PLAIN: dict[str, tuple[Any, str]] = {
    "main_gpu": (0, "main_gpu"),
    "n_threads": (None, "n_threads"),
    "n_threads_batch": (None, "n_threads_batch"),
    "rope_freq_base": (0.0, "rope_freq_base"),
    "rope_freq_scale": (0.0, "rope_freq_scale"),
    "yarn_ext_factor": (-1.0, "yarn_ext_factor"),
    "yarn_attn_factor": (1.0, "yarn_attn_factor"),
    "yarn_beta_fast": (32.0, "yarn_beta_fast"),
    "yarn_beta_slow": (1.0, "yarn_beta_slow"),
    "yarn_orig_ctx": (0, "yarn_orig_ctx"),
    "swa_full": (None, "swa_full"),
    "spm_infill": (False, "spm_infill"),
    "chat_format": (None, "chat_template"),
}
_NAMED: dict[str, tuple[Any, str, Mapping[int, str]]] = {
    "split_mode": (1, "split_mode", _SPLIT),
    "rope_scaling_type": (-1, "rope_scaling", _ROPE),
    "pooling_type": (-1, "pooling", _POOLING),
    "type_k": (None, "type_k", _TYPES),
    "type_v": (None, "type_v", _TYPES),
}
_OTHERS = {
    *("offload_kqv", "op_offload", "use_mmap", "use_mlock", "tensor_split", "kv_overrides"),
    *("lora_path", "lora_scale", "lora_base", "numa", "no_perf"),
}
THEIRS = _PLAIN.keys() | _NAMED.keys() | _OTHERS  # parameters that engine_options() knows
_TEMPLATES = {"llama-2": "llama2", "mistral-instruct": "mistral-v1", "phi3": "phi3", "llama-3": "llama3"}


def engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options for LLM. Raises: ValueError for a value that has no meaning here."""
    found: dict[str, Any] = {}
    for name, (default, option) in _PLAIN.items():
        if name in given and given[name] != default:
            found[option] = given[name]
    if "chat_template" in found:
        found["chat_template"] = _TEMPLATES.get(found["chat_template"], found["chat_template"])
    for name, (default, option, values) in _NAMED.items():
        if name in given and given[name] != default:
            if given[name] not in values:
                raise ValueError(f"{name}={given[name]} is none of {', '.join(map(str, values))}")
            found[option] = values[given[name]]
    if given.get("lora_base") is not None:
        raise ValueError("lora_base is no longer there: an adapter goes with the model as it is loaded")
    if not given.get("offload_kqv", True):
        found["no_kv_offload"] = True
    if given.get("op_offload") is not None:
        found["op_offload"] = bool(given["op_offload"])
    if "no_perf" in given:
        found["perf"] = not given["no_perf"]
    if not given.get("use_mmap", True):
        found["load_mode"] = "mlock" if given.get("use_mlock") else "none"
    elif given.get("use_mlock"):
        found["load_mode"] = "mmap+mlock"
    if given.get("tensor_split"):
        found["tensor_split"] = ",".join(map(str, given["tensor_split"]))
    if given.get("kv_overrides"):
        found["override_kv"] = ",".join(f"{key}={_typed(value)}" for key, value in given["kv_overrides"].items())
    if given.get("lora_path"):
        found["lora_scaled"] = {os.fspath(given["lora_path"]): given.get("lora_scale", 1.0)}
    if given.get("numa"):
        found["numa"] = "distribute"
    return found


def _typed(value: object) -> str:
    if isinstance(value, bool):
        return f"bool:{str(value).lower()}"
    return f"{'int' if isinstance(value, int) else 'float' if isinstance(value, float) else 'str'}:{value}"


def usage_of(answer: Completion | Chunk) -> dict[str, int]:
    """Tokens, as OpenAI's API counts them. Of a chunk, one that ends a text."""
    assert answer.usage is not None
    n_prompt, n_generated = answer.usage.prompt_tokens, answer.usage.generated_tokens
    return {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}


def completion_logprobs(entries: Sequence[Any], offset: int) -> dict[str, list[Any]]:
    """Log-probabilities in the form of OpenAI's first API; `entries` are those of its later one."""
    found: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for entry in entries:
        found["tokens"].append(entry.text)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(entry.logprob)
        found["top_logprobs"].append({top.text: top.logprob for top in entry.top})
        offset += len(entry.text)
    return found
