"""How an engine is made: keyword arguments, which are flags of superllama-server, and its own defaults."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from .._commands.pull import pull
from .._errors import ModelError
from .._files import model_bytes
from .._gguf import check_gguf
from .._memory import memory
from .._models import by_name, fetched
from .._programs import model_words, odd_file, opposite, secret_first
from .library import draft_type, flags
from .names import by_own_names, unknown
from .projector import check_projector

AnyPath = str | os.PathLike[str]
Size = int | str


class EngineOptions(TypedDict, total=False):
    """What LLM and AsyncLLM take, beside any other flag of superllama-server by its name with underscores
    (`cache_reuse=256`, `override_tensor="exps=CPU"`, `no_warmup=True`), which `flags` holds for who has types checked.
    """

    # memory
    n_ctx: int  # cells of the KV cache, shared by all sequences (8192); 0 = the model's whole context
    n_parallel: int  # sequences that are computed at once (4)
    n_batch: int  # tokens that are taken up at once (2048)
    n_ubatch: int  # tokens that are computed at once (512); the longest text that can be embedded
    dynamic_layers: bool  # a part in memory, the rest read when needed; a budget switches it on
    async_prefetch: bool  # read ahead in threads (on where layers are dynamic)
    mem_budget: Size  # of the host, for weights, KV cache and buffers: "8GiB", "60%", "auto"
    vram_budget: Size | Sequence[Size]  # of devices: one size for all, or one for each; 0 = no layers there
    expert_misses: Literal["send", "share"]  # of a card: sent there, or shared with the processor, inexactly ("send")
    paged_kv: bool  # memory for what of the KV cache is used; kv_budget switches it on
    kv_budget: Size  # that KV pages may hold; what is over it goes to disk
    spill_dir: AnyPath  # where KV pages go, and the slots of a paused engine (the system's temporary folder)
    idle_release: int  # seconds without requests after which the memory is given back (never)
    n_gpu_layers: int  # the most layers that go to devices; -1 = as many as there is room for
    cache_ram: int  # MiB of prompts kept beside the slots (8192)
    type_k: str  # of numbers in the K cache: "f16", "q8_0", ... (f16)
    type_v: str  # the same of the V cache
    repack: bool  # weights in the layout of the fastest kernels (True)
    # computing
    n_threads: int  # that generate (the cores that this process may keep busy)
    n_threads_batch: int  # that compute prompts (n_threads)
    adapt_threads: Literal["exact", "on", "off"]  # fewer while others keep cores busy ("exact": no bit changes)
    flash_attn: Literal["on", "off", "auto"] | bool  # fused attention ("auto")
    swa_full: bool  # keep all cells of sliding windows, so that a prompt can go back in them
    kv_unified: bool  # sequences share the n_ctx cells (True); else each has its part
    # what it does
    embedding: bool  # for embed()
    reranking: bool  # for rerank()
    pooling: Literal["none", "mean", "cls", "last", "rank"]  # how the vectors of tokens become one (the model's)
    lora: AnyPath | Sequence[AnyPath]  # adapters, at scale 1
    lora_scaled: Mapping[str, float]  # file -> scale
    control_vector: AnyPath | Sequence[AnyPath]  # added to the layers' outputs
    mmproj: AnyPath  # the projector, for images and sounds
    chat_template: str  # a template in Jinja, or the name of one that llama.cpp has (the model's)
    chat_template_file: AnyPath  # a file with one
    chat_template_kwargs: Mapping[str, Any]  # its variables, for all requests
    reasoning_format: Literal["none", "deepseek", "deepseek-legacy", "auto"]  # "none": thoughts are in the text
    reasoning_budget: int  # tokens of thoughts; 0 = none, -1 = no limit (-1)
    slot_save_path: AnyPath  # the folder of save_slot()
    # speculation
    speculative: str  # "ngram", "mtp", or the path of a draft model
    # our log
    metrics_file: AnyPath  # JSON lines go there
    verbosity: int  # of llama.cpp's own log on stderr: -1 = nothing, 3 = as its programs (-1)
    flags: Mapping[str, Any]  # others of superllama-server, as if they were named here


_SYNONYMS = {
    "ctx_size": "n_ctx",
    "max_model_len": "n_ctx",
    "num_ctx": "n_ctx",
    "batch_size": "n_batch",
    "ubatch_size": "n_ubatch",
    "parallel": "n_parallel",
    "max_num_seqs": "n_parallel",
    "n_seq_max": "n_parallel",
    "threads": "n_threads",
    "num_thread": "n_threads",
    "threads_batch": "n_threads_batch",
    "gpu_layers": "n_gpu_layers",
    "num_gpu": "n_gpu_layers",
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    "embeddings": "embedding",
    "rerank": "reranking",
}
_FLAGS = {
    "n_ctx": "--ctx-size",
    "n_parallel": "--parallel",
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_threads": "--threads",
    "n_threads_batch": "--threads-batch",
    "n_gpu_layers": "--n-gpu-layers",
    "type_k": "--cache-type-k",
    "type_v": "--cache-type-v",
}
_DRAFT = {"ngram": ["--spec-default"], "mtp": ["--spec-type", "draft-mtp"]}


def arguments(model: str, options: Mapping[str, Any]) -> list[str]:
    """The command line of an engine.

    Raises: TypeError for a name that nobody knows, ModelError for a file that is no model.
    """
    given = {**options.get("flags", {}), **{k: v for k, v in options.items() if k != "flags"}}
    found = by_own_names({name: value for name, value in given.items() if value is not None}, _SYNONYMS)
    if model.startswith("hf:"):
        if not any(name.startswith("hf_") or name == "offline" for name in found) and fetched(model) is None:
            pull(model)  # with its bar, and the reason where it cannot be had
        words = model_words(model)
    else:
        file = check_gguf(model)
        words = ["--model", str(file)]
        if not places_layers(found) and _is_too_large(file):
            found["dynamic_layers"] = True
    if "mmproj" in found:
        found["mmproj"] = check_projector(found["mmproj"])
    if _streams(found):
        found.setdefault("async_prefetch", True)
    found.setdefault("n_ctx", 8192)
    found.setdefault("kv_unified", True)  # else each of n_parallel sequences had its share of the cells
    for key, value in found.items():
        words += _words(key, value)
    if "--model-draft" in words and "spec_type" not in found:  # without a type it would be loaded, and nobody asked it
        words += ["--spec-type", draft_type(words[words.index("--model-draft") + 1])]
    if problem := odd_file(words):
        raise ModelError(problem)
    return secret_first(words)


def places_layers(options: Mapping[str, Any]) -> bool:
    """Whether the caller says where layers lie, so that nothing is chosen for them."""
    names = ("dynamic_layers", "async_prefetch", "mem_budget", "vram_budget")
    return any(options.get(name) is not None for name in names)


def _streams(options: Mapping[str, Any]) -> bool:
    """Whether layers are dynamic: by name, or for a budget that somebody chose."""
    budgets = any(options.get(name, "auto") != "auto" for name in ("mem_budget", "vram_budget"))
    return bool(options.get("dynamic_layers", budgets))


def _is_too_large(file: Path) -> bool:
    """Whether a model has no room in what memory is there now."""
    return model_bytes(file) > 0.9 * memory().host_available


def _words(name: str, value: Any) -> list[str]:
    if name == "speculative":
        if value in _DRAFT:
            return _DRAFT[value]
        return ["--model-draft", os.fspath(by_name(value))]
    if name == "lora_scaled" and isinstance(value, Mapping):
        return ["--lora-scaled", ",".join(f"{os.fspath(file)}:{scale}" for file, scale in value.items())]
    if name == "chat_template_kwargs" and isinstance(value, Mapping):
        return ["--chat-template-kwargs", json.dumps(dict(value))]
    flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
    known = flags()
    if flag not in known:
        raise unknown(name, EngineOptions.__annotations__, [*_SYNONYMS, *map(_own_name, known)], "LLM")
    if name == "flash_attn" and isinstance(value, bool):
        value = "on" if value else "off"
    if not known[flag]:
        return _switch(name, flag, value)
    if isinstance(value, bool):
        raise TypeError(f"{name} takes a value, not {value}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(str(item) if isinstance(item, int) else os.fspath(item) for item in value)
    return [flag, str(value) if isinstance(value, int | float) else os.fspath(value)]


def _switch(name: str, flag: str, value: Any) -> list[str]:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a switch, True or False, not {value!r}")
    if value:
        return [flag]
    off = opposite(flag)
    return [off] if off in flags() else []  # what cannot be switched off is off


def _own_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
