"""Parameters: pydantic models over the C structs llama_model_params, llama_context_params and ours in them.

Names are the C names, or those of llama.cpp's flags where RENAMED says so; defaults are read from the library.
`to_c()` fills a C struct; what it points to is kept alive by the `owned` list that the caller holds.

One rule for budgets: a budget other than "auto", and what else means nothing without the part of the library that
enforces it, switches that part on; switched off by name beside it, it is an error. None is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ._c_params import ENUMS, buffer_type_overrides, device_list, float_list, kv_override_list
from ._errors import Error
from ._native import ffi, lib, log
from ._sizes import device_sizes, size_bytes

_MODEL = lib.llama_model_default_params()
_CONTEXT = lib.llama_context_default_params()

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


def _checked_size(value: object) -> object:
    if isinstance(value, int | str):
        size_bytes(value)
    return value


def _checked_device_sizes(value: object) -> object:
    device_sizes(value)
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[int | str, BeforeValidator(_checked_size)]
VramBudget = Annotated[int | str | tuple[int | str, ...], BeforeValidator(_checked_device_sizes)]
KvOverride = bool | int | float | str

# our name -> the C name
RENAMED = {
    "attention": "attention_type",
    "kv_budget": "kv_budget_bytes",
    "vram_budget": "vram_budget_bytes",
    "flash_attn": "flash_attn_type",
    "mem_budget": "mem_budget_bytes",
    "override_kv": "kv_overrides",
    "override_tensor": "tensor_buft_overrides",
    "pooling": "pooling_type",
    "rope_scaling": "rope_scaling_type",
}

# C fields that are no parameters here, and why
LEFT_OUT = {
    "progress_callback": "Model(progress=...)",
    "progress_callback_user_data": "Model(progress=...)",
    "no_alloc": "a model without weights cannot be used for anything that the package offers",
    "projector_bytes": "LLM(mmproj=...), plan(mmproj=...)",
    "plan_only": "superllama_plan() sets it for a model that it only measures",
    "ctx_type": "draft contexts (MTP) are a matter of the server's speculative decoding",
    "ctx_other": "draft contexts (MTP) are a matter of the server's speculative decoding",
    "n_outputs_max": "0 = n_batch; the library aborts when a batch asks for more outputs than this",
    "n_outputs_max_per_seq": "only for samplers that run on the device",
    "defrag_thold": "deprecated, without effect",
    "cb_eval": "would run Python for every node of the graph",
    "cb_eval_user_data": "would run Python for every node of the graph",
    "abort_callback": "Context.cancel()",
    "abort_callback_data": "Context.cancel()",
    "samplers": "samplers that run on the device are experimental",
    "n_samplers": "samplers that run on the device are experimental",
    "superllama": "its members are parameters of their own",
}


def _default(struct: Any, name: str) -> Any:
    """The library's default for one of our names."""
    value = getattr(struct, RENAMED.get(name, name))
    if name in ENUMS:
        return next(text for text, c in ENUMS[name].items() if c == value)
    return value


P = TypeVar("P", bound=BaseModel)


def merged(kind: type[P], params: P | None, kwargs: dict[str, Any]) -> P:
    """`params` with the keyword arguments over it, validated.

    Raises: pydantic.ValidationError; Error if `params` is not of this kind, nor a mapping of its fields.
    """
    if isinstance(params, kind):
        if not kwargs:
            return params
        given: Mapping[str, Any] = params.model_dump(exclude_unset=True)
    elif params is None or isinstance(params, Mapping):
        given = params or {}
    else:
        raise Error(
            f"params is of type {type(params).__name__}; give a {kind.__name__}, or its fields as keyword arguments"
        )
    return kind.model_validate({**given, **kwargs})


def is_auto(name: str, value: Any) -> bool:
    """Whether a budget is left to the library, or a switch is off."""
    if name == "vram_budget":
        return not any(device_sizes(value))
    return size_bytes(value) == 0 if name.endswith("_budget") else not value


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    _by_hand: ClassVar[frozenset[str]] = frozenset()  # fields that are not plain numbers or enums
    _superllama: ClassVar[frozenset[str]] = frozenset()  # members of the nested struct
    _enforcer: ClassVar[str] = ""  # the switch without which those of _enforced mean nothing
    _enforced: ClassVar[tuple[str, ...]] = ()
    _implied_by: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _switch_on_what_enforces(self) -> _Params:
        switch = self._enforcer
        names = tuple(name for name in self._enforced if not is_auto(name, getattr(self, name)))
        if names and not getattr(self, switch):
            if switch in self.model_fields_set:
                raise ValueError(f"{switch}=False, and {names[0]} means nothing without it; leave one of them out")
            self.__dict__[switch] = True  # not among the fields that were set: it goes when the budget goes
            self._implied_by = names
        return self

    def log_implied(self) -> None:
        """One line, if something was switched on that nobody named."""
        if self._implied_by:
            log.info("%s is on, for %s", self._enforcer, " and ".join(self._implied_by))

    def _fill(self, c: Any) -> None:
        """Copy the plain fields into the C struct."""
        for name in type(self).model_fields:
            if name not in self._by_hand:
                value = getattr(self, name)
                struct = c.superllama if name in self._superllama else c
                setattr(struct, RENAMED.get(name, name), ENUMS[name][value] if name in ENUMS else value)


class ModelParams(_Params):
    """How a model is loaded: llama_model_params."""

    devices: tuple[str, ...] | None = Field(
        None, description="names of devices to use (superllama.devices()); None = all"
    )
    override_tensor: dict[str, str] = Field(
        {}, description="regular expression over tensor names -> buffer type, e.g. {'ffn_.*_exps': 'CPU'}"
    )
    n_gpu_layers: int = Field(
        _default(_MODEL, "n_gpu_layers"), ge=-1, le=2**31 - 1, description="layers in device memory; -1 = all"
    )
    split_mode: Literal["none", "layer", "row", "tensor"] = Field(
        _default(_MODEL, "split_mode"),
        description="how devices share the model: whole layers, or parts of each ('row', 'tensor'; no dynamic layers)",
    )
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"] = Field(
        _default(_MODEL, "load_mode"),
        description="without dynamic layers: map the file, lock it in memory, read it past the page cache ('dio')",
    )
    lazy_mode: Literal["off", "auto", "on"] = Field(
        _default(_MODEL, "lazy_mode"),
        description="read rows of some tensors from disk when they are needed; 'auto': of those above 4 GiB",
    )
    main_gpu: int = Field(_default(_MODEL, "main_gpu"), ge=0, le=2**31 - 1, description="device for split_mode 'none'")
    tensor_split: tuple[Annotated[Finite, Field(ge=0)], ...] | None = Field(
        None, description="how much of the model each device gets, any unit"
    )
    override_kv: dict[Annotated[str, Field(min_length=1)], KvOverride] = Field(
        {}, description="metadata of the model to change"
    )
    vocab_only: bool = Field(_default(_MODEL, "vocab_only"), description="load no weights: for tokenizing only")
    check_tensors: bool = Field(_default(_MODEL, "check_tensors"), description="look for invalid numbers while loading")
    use_extra_bufts: bool = Field(_default(_MODEL, "use_extra_bufts"), description="repack weights for faster kernels")
    no_host: bool = Field(
        _default(_MODEL, "no_host"),
        description="no page-locked host memory of devices, so that weights can be repacked",
    )
    load_mtp: bool = Field(_default(_MODEL, "load_mtp"), description="load the layers for multi-token prediction")

    dynamic_layers: bool = Field(
        _default(_MODEL.superllama, "dynamic_layers"),
        description="hold a part of the layers, read the rest when needed; a budget or async_prefetch switches it on",
    )
    async_prefetch: bool = Field(_default(_MODEL.superllama, "async_prefetch"), description="read ahead in threads")
    prefetch_threads: int = Field(
        _default(_MODEL.superllama, "prefetch_threads"), ge=0, le=1024, description="threads that read; 0 = default"
    )
    layer_policy: Literal["pin", "lru"] = Field(
        _default(_MODEL.superllama, "layer_policy"), description="which layers are held: a fixed set, or the latest"
    )
    expert_misses: Literal["send", "share"] = Field(
        _default(_MODEL.superllama, "expert_misses"),
        description="experts that are chosen and that a device lacks: all are sent there, so that results do not "
        "depend on what it holds; or the host computes some of them meanwhile, which changes last digits",
    )
    mem_budget: Size = Field(
        "auto",
        description="host memory for weights, KV and compute buffers: bytes, '8GiB', '60%' of what this process may "
        "use, or 'auto', which follows the memory that is there",
    )
    vram_budget: VramBudget = Field(
        "auto",
        description="memory of a device for weights, KV and compute buffers: bytes, '8GiB', "
        "'auto' for the high mark of what is free, 0 for no layers; or one for each, the last one for all that follow",
    )
    mem_pressure: float = Field(
        _default(_MODEL.superllama, "mem_pressure"), ge=0, le=1, description="part of memory above which layers go"
    )
    mem_pressure_low: float = Field(
        _default(_MODEL.superllama, "mem_pressure_low"),
        ge=0,
        le=1,
        validate_default=True,
        description="part below which they come back; less than mem_pressure",
    )

    _by_hand: ClassVar[frozenset[str]] = frozenset(
        {"devices", "override_tensor", "tensor_split", "override_kv", "mem_budget", "vram_budget"}
    )
    _enforcer: ClassVar[str] = "dynamic_layers"
    _enforced: ClassVar[tuple[str, ...]] = ("mem_budget", "vram_budget", "async_prefetch")
    _superllama: ClassVar[frozenset[str]] = frozenset(
        {"dynamic_layers", "async_prefetch", "prefetch_threads", "layer_policy", "expert_misses"}
        | {"mem_pressure", "mem_pressure_low"}
    )

    @field_validator("tensor_split")
    @classmethod
    def _fits_devices(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(value) > lib.llama_max_devices():
            raise ValueError(f"{len(value)} parts for at most {lib.llama_max_devices()} devices")
        return value

    @field_validator("mem_pressure_low")
    @classmethod
    def _below_high(cls, value: float, info: ValidationInfo) -> float:
        high = info.data.get("mem_pressure")
        if high is not None and value >= high:
            raise ValueError(f"the low mark is {value:g}; it must be below mem_pressure, which is {high:g}")
        return value

    def to_c(self, owned: list[Any]) -> Any:
        """A llama_model_params by value; `owned` must live as long as the model."""
        c = lib.llama_model_default_params()
        self._fill(c)
        c.devices = device_list(self.devices, owned)
        c.tensor_buft_overrides = buffer_type_overrides(self.override_tensor, owned)
        c.tensor_split = float_list(self.tensor_split, lib.llama_max_devices(), owned)
        c.kv_overrides = kv_override_list(self.override_kv, owned)
        c.superllama.mem_budget_bytes = size_bytes(self.mem_budget)
        c.superllama.vram_budget_bytes = device_sizes(self.vram_budget)
        return c


class ContextParams(_Params):
    """What a context is given to work with: llama_context_params, and the members of its superllama struct.

    `n_ctx`, `n_threads` and `n_threads_batch` differ from the library's defaults, which are 512 and 4 whatever
    the model and the machine: None chooses from both, as written with each.
    """

    n_ctx: UInt32 | None = Field(
        None, description="tokens of context; None = what the model was trained with, at most 4096; 0 = all of it"
    )
    n_batch: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        _default(_CONTEXT, "n_batch"), description="tokens in one call of the library; longer prompts are split"
    )
    n_ubatch: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        _default(_CONTEXT, "n_ubatch"), description="tokens computed at once"
    )
    n_seq_max: int = Field(
        _default(_CONTEXT, "n_seq_max"), ge=1, le=lib.llama_max_parallel_sequences(), description="sequences"
    )
    n_rs_seq: UInt32 = Field(
        _default(_CONTEXT, "n_rs_seq"),
        description="states that a recurrent model keeps to go back to, for each sequence; 0 = none",
    )
    n_threads: Annotated[int, Field(ge=1, le=512)] | None = Field(
        None, description="threads that generate; None = the physical cores that this process may use"
    )
    n_threads_batch: Annotated[int, Field(ge=1, le=512)] | None = Field(
        None, description="threads that process prompts; None = n_threads"
    )
    rope_scaling: Literal["model", "none", "linear", "yarn", "longrope"] = Field(
        _default(_CONTEXT, "rope_scaling"), description="how positions are scaled for a longer context"
    )
    pooling: Literal["model", "none", "mean", "cls", "last", "rank"] = Field(
        _default(_CONTEXT, "pooling"),
        description="how the vectors of a text's tokens become one; 'rank': scores of a reranker",
    )
    attention: Literal["model", "causal", "non-causal"] = Field(
        _default(_CONTEXT, "attention"), description="for embeddings: whether a token sees those after it"
    )
    flash_attn: Literal["auto", "on", "off"] = Field(_default(_CONTEXT, "flash_attn"), description="fused attention")
    rope_freq_base: Annotated[Finite, Field(ge=0)] = Field(
        _default(_CONTEXT, "rope_freq_base"), description="0 = the model's"
    )
    rope_freq_scale: Annotated[Finite, Field(ge=0)] = Field(
        _default(_CONTEXT, "rope_freq_scale"), description="0 = the model's"
    )
    yarn_ext_factor: Finite = Field(
        _default(_CONTEXT, "yarn_ext_factor"), description="how much YaRN extrapolates; negative = the model's"
    )
    yarn_attn_factor: Finite = Field(_default(_CONTEXT, "yarn_attn_factor"), description="YaRN's factor of attention")
    yarn_beta_fast: Finite = Field(_default(_CONTEXT, "yarn_beta_fast"), description="YaRN's low correction dimension")
    yarn_beta_slow: Finite = Field(_default(_CONTEXT, "yarn_beta_slow"), description="YaRN's high correction dimension")
    yarn_orig_ctx: UInt32 = Field(
        _default(_CONTEXT, "yarn_orig_ctx"), description="tokens of context before YaRN; 0 = the model's"
    )
    type_k: CacheType = Field(_default(_CONTEXT, "type_k"), description="numbers in the K cache")
    type_v: CacheType = Field(_default(_CONTEXT, "type_v"), description="numbers in the V cache")
    embeddings: bool = Field(_default(_CONTEXT, "embeddings"), description="keep embeddings, beside logits")
    offload_kqv: bool = Field(
        _default(_CONTEXT, "offload_kqv"), description="the KV cache on devices, with the layers that are there"
    )
    no_perf: bool = Field(_default(_CONTEXT, "no_perf"), description="measure no timings of the library's own")
    op_offload: bool = Field(
        _default(_CONTEXT, "op_offload"), description="compute large batches on a device, also with weights of the host"
    )
    swa_full: bool = Field(
        _default(_CONTEXT, "swa_full"),
        description="keep all cells of sliding windows, so that a sequence can go back in them",
    )
    moe_cache_size: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        _default(_CONTEXT, "moe_cache_size"),
        description="bytes on devices for copies of experts that lie in host memory; not with dynamic layers",
    )
    kv_unified: bool = Field(_default(_CONTEXT, "kv_unified"), description="sequences share the n_ctx cells")

    metrics: bool = Field(_default(_CONTEXT.superllama, "metrics"), description="JSON lines to stderr")
    metrics_file: Path | None = Field(None, description="JSON lines to this file")
    metrics_interval_ms: int = Field(
        _default(_CONTEXT.superllama, "metrics_interval_ms"),
        ge=0,
        le=2**31 - 1,
        description="at most one periodic line in so long",
    )
    metrics_pretty: bool = Field(
        _default(_CONTEXT.superllama, "metrics_pretty"), description="the JSON indented, over several lines"
    )

    paged_kv: bool = Field(
        _default(_CONTEXT.superllama, "paged_kv"),
        description="KV cache in pages: memory for what is used, spilled to disk over the budget; kv_budget, spill_dir "
        "or async_prefetch switches it on",
    )
    kv_page_size: int = Field(
        _default(_CONTEXT.superllama, "kv_page_size"), ge=16, le=8192, description="cells of a KV page"
    )
    kv_budget: Size = Field(
        "auto",
        description="memory that KV pages may hold: bytes, '512MiB', '10%' of what this process may use, or 'auto' for "
        "half of what is available",
    )
    spill_dir: Path | None = Field(None, description="where KV pages spill; None = the system's temporary folder")
    async_prefetch: bool = Field(
        _default(_CONTEXT.superllama, "async_prefetch"), description="restore KV pages ahead, in threads"
    )
    prefetch_threads: int = Field(
        _default(_CONTEXT.superllama, "prefetch_threads"), ge=0, le=1024, description="threads that read; 0 = default"
    )

    adapt_threads: Literal["exact", "on", "off"] = Field(
        _default(_CONTEXT.superllama, "adapt_threads"),
        description="compute with fewer threads while other processes keep cores busy: exact = with dynamic layers or "
        "paged KV, as long as no bit of a result depends on it; on = always",
    )

    _by_hand: ClassVar[frozenset[str]] = frozenset(
        {"n_ctx", "n_threads", "n_threads_batch", "metrics_file", "kv_budget", "spill_dir"}
    )
    _enforcer: ClassVar[str] = "paged_kv"
    _enforced: ClassVar[tuple[str, ...]] = ("kv_budget", "spill_dir", "async_prefetch")
    _superllama: ClassVar[frozenset[str]] = frozenset(
        {"metrics", "metrics_interval_ms", "metrics_pretty", "paged_kv", "kv_page_size", "async_prefetch"}
        | {"prefetch_threads", "adapt_threads"}
    )

    def at_once(self, architecture: str, metadata: Mapping[str, str]) -> bool:
        """Whether a text cannot be computed in parts, since every token sees all others."""
        own_attention = metadata.get(f"{architecture}.attention.causal") == "false"
        return self.attention == "non-causal" or (self.attention == "model" and own_attention)

    def to_c(self, owned: list[Any], *, n_ctx: int, n_threads: int, at_once: bool = False) -> Any:
        """A llama_context_params by value; `owned` must live until the context is made."""
        c = lib.llama_context_default_params()
        self._fill(c)
        c.n_ctx = n_ctx
        if (self.embeddings or at_once) and "n_ubatch" not in self.model_fields_set:
            c.n_ubatch = c.n_batch
        c.n_threads = self.n_threads or n_threads
        c.n_threads_batch = self.n_threads_batch or c.n_threads
        if self.metrics_file is not None:
            owned.append(ffi.new("char[]", os.fsencode(self.metrics_file)))
            c.superllama.metrics_file = owned[-1]
        c.superllama.kv_budget_bytes = size_bytes(self.kv_budget)
        if self.spill_dir is not None:
            owned.append(ffi.new("char[]", os.fsencode(self.spill_dir)))
            c.superllama.spill_dir = owned[-1]
        return c


class SamplingParams(BaseModel):
    """How the next token is chosen, and when generation ends. Defaults are those of llama.cpp's programs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(
        None, ge=0, description="tokens to generate at most; None = until the context is full"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="texts that end generation")
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False, description="0 = always the most likely token")
    top_k: int = Field(40, ge=0, le=2**31 - 1, description="keep the K most likely; 0 = all")
    top_p: float = Field(0.95, ge=0, le=1, description="keep the most likely that make up this probability; 1 = all")
    min_p: float = Field(0.05, ge=0, le=1, description="keep those this likely beside the best; 0 = all")
    typical_p: float = Field(1.0, ge=0, le=1, description="keep the locally typical; 1 = all")
    repeat_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="1 = off")
    frequency_penalty: Finite = Field(0.0, description="0 = off")
    presence_penalty: Finite = Field(0.0, description="0 = off")
    penalty_last_n: int = Field(64, ge=-1, le=2**31 - 1, description="tokens that penalties look at; -1 = the context")
    seed: int | None = Field(None, ge=0, lt=2**32 - 1, description="same seed, same text; None = a new one each time")
    grammar: str | None = Field(None, min_length=1, description="GBNF grammar with a rule `root`")
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(lt=float("inf"))]] = Field(
        {}, description="token -> added to its logit; -inf bans it"
    )
    ignore_eos: bool = Field(False, description="go on when the model would end")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("grammar")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("a grammar cannot contain a NUL character")
        return value
