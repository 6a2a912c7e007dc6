"""What a model would do here under a budget, before its weights are loaded: memory, reads per token, speed.

The library lays the model out as a load would and says what stays in memory; disk and CPU are measured for a
moment; the rest is arithmetic. While one block is computed the next is read, so a token takes the longer of the
two times, with async_prefetch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from ._cache import cache_dir
from ._context_base import DEFAULT_N_CTX_MAX
from ._engine.library import projector_bytes
from ._engine.projector import check_projector
from ._errors import ModelError
from ._files import model_bytes
from ._memory import memory, n_physical_cores
from ._model import Model
from ._native import collected_errors, ffi, last_error, lib, reason, text
from ._params import ContextParams, ModelParams, merged
from ._process import check_can_compute
from ._read_speed import measure_read
from ._sizes import size_bytes

READ_BYTES = 4 << 30
READ_SECONDS = 0.6
PROMPT_TOKENS = 512
SHARES = (25, 50, 75, 90, 100)  # percent of what everything needs
SAME = 1.02  # speeds within this factor count as equal

Limit = Literal["disk", "CPU"]
Use = Literal["generate", "llm", "completion", "embed", "perplexity", "server"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured: bytes of weights a second."""

    read_bytes_per_s: float  # of the disk that the model lies on
    read_how: str  # as ReadSpeed has it
    cpu_bytes_per_s: float  # with the kernels that would be used
    cpu_type: str  # of the weights that it was measured with
    n_threads: int  # that it was measured with


@dataclasses.dataclass(frozen=True)
class Row:
    """One budget. Bytes, unless the name says otherwise; what would be resident is 0 if it does not work."""

    label: str  # "asked", "least", "25 %" of what everything needs, ...
    mem_budget_bytes: int  # the budget
    works: bool  # whether it is at least what is needed
    fixed_bytes: int  # weights that are always resident
    pinned_bytes: int  # of the layers, resident
    ring_bytes: int  # for streamed blocks in use and on their way
    expert_pool_bytes: int  # memory for experts
    kv_bytes: int  # of the KV cache
    projector_bytes: int  # of the projector of images and sounds, with what it computes in; 0 = there is none
    compute_bytes: int  # buffers of graphs, of kernels, of logits
    streamed_bytes: int  # of the layers, read in every pass over the weights
    expert_read_bytes: int  # of experts, read per token: an upper estimate, as if every expert were as likely
    tokens_per_s: float | None  # expected when generating; None if the budget does not work
    seconds_disk: float | None  # reading for one token
    seconds_cpu: float | None  # computing one token
    limit: Limit | None  # the longer of the two

    @property
    def read_bytes_per_token(self) -> int:
        """What one token reads."""
        return self.streamed_bytes + self.expert_read_bytes


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt streams the layers once per ubatch. Times are of the asked budget, None if it does not work."""

    n_tokens: int  # 512, or as many as the context has
    n_ubatch: int  # tokens computed at once
    n_passes: int  # over the weights
    seconds_least: float | None  # the disk's time, or the CPU's if a pass took it no longer than one token
    seconds_most: float | None  # the disk's time, or the CPU's if every token took it as long as a generated one
    advice: str | None  # what would make prompts faster, if something would


@dataclasses.dataclass(frozen=True)
class Repack:
    """The layout of the weights for faster kernels. `file_bytes`: of the file of repacked blocks in the cache
    folder that streaming needs, 0 if none is needed."""

    asked: bool  # whether this plan is with it
    file_bytes: int  # of the file in the cache folder; 0 = none is needed
    faster: Literal["repack", "no-repack", "same"]  # which of both generates faster here
    why: str  # in words


@dataclasses.dataclass(frozen=True)
class Plan:
    """What superllama.plan() found."""

    model: Path  # its file
    model_bytes: int  # of its file, or of all parts of it
    n_ctx: int  # tokens of context
    n_layers: int  # as llama.cpp counts them
    n_blocks: int  # in which dense weights come and go
    n_experts: int  # of a layer; 0 = a dense model
    n_experts_used: int  # of them, for each token
    mem_least_bytes: int  # the smallest budget that works
    mem_full_bytes: int  # the smallest that holds everything
    asked: Row  # under the budget that was asked about
    table: tuple[Row, ...]  # under other budgets, the smallest first
    prompt: Prompt  # how a prompt would be processed
    repack: Repack  # whether repacked weights are worth it
    machine: Machine  # what was measured

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = dataclasses.asdict(self)
        found["model"] = str(self.model)
        for row, of in [(found["asked"], self.asked), *zip(found["table"], self.table, strict=True)]:
            row["read_bytes_per_token"] = of.read_bytes_per_token
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: each budget with what it would be for, and its speed."""
        from ._look.html import plan_view

        return plan_view(self.as_dict())


def plan(
    path: str | os.PathLike[str],
    params: ModelParams | None = None,
    context_params: ContextParams | None = None,
    *,
    mem_budget: int | str | None = None,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    repack: bool | None = None,
    use: Use = "generate",
    n_parallel: int | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> Plan:
    """What of a model (a GGUF file, or a name of `superllama list`) would live where under `mem_budget` ("8GiB", "60%",
    bytes; default "auto"), and how fast; no weights are loaded. Takes about two seconds, most of them to measure this
    disk and this CPU.

    `params` and `context_params` are those that the model and its context would be made with; the keywords are
    fields of them and win (`repack` is use_extra_bufts). `use` is what it is for, which changes how many logits there
    are and how much is computed at once: "generate" (Context), "llm" (LLM, with `n_parallel` sequences, 4 by default,
    that share the context), "completion" (superllama-completion, whose windows are as small as they may be), "embed" (a
    whole text at once), "perplexity" (logits of every token), "server" (superllama-server and -cli: as "llm", but
    sequences whose number is given have a part of the context each, unless kv_unified says otherwise). What the last
    and "llm" keep of finished prompts comes on top, where there is room. `mmproj` is the projector that goes with it:
    it lies in the budget too, unless a device has it.

    Raises: ModelError if the file cannot be read or planned for, pydantic.ValidationError for wrong values,
    ForkedError in a fork of a process that had a context or made a plan.
    """
    q = question(path, params, context_params, mem_budget, n_ctx, n_ubatch, n_threads, repack, use, n_parallel, mmproj)
    params, context = q.params, q.context
    budget = size_bytes(params.mem_budget) or int(memory().host_available * params.mem_pressure)

    need = library_plan(q.file, params, context, [budget], q.at_once, q.n_outputs, q.n_projector)[0]
    marks = {f"{share} %": need.mem_full_bytes * share // 100 for share in SHARES}
    budgets = {"asked": budget, "least": need.mem_least_bytes, **marks}
    plans = library_plan(q.file, params, context, list(budgets.values()), q.at_once, q.n_outputs, q.n_projector)
    found = dict(zip(budgets, plans, strict=True))
    other_params = merged(ModelParams, params, {"use_extra_bufts": not params.use_extra_bufts})
    other = library_plan(q.file, other_params, context, [budget], q.at_once, q.n_outputs, q.n_projector)[0]

    machine, other_rate = measure(q.file, params.use_extra_bufts, context.n_threads or n_physical_cores())
    rows = {label: row(label, p, machine.read_bytes_per_s, machine.cpu_bytes_per_s) for label, p in found.items()}
    other_row = row("asked", other, machine.read_bytes_per_s, other_rate)
    asked = rows.pop("asked")
    return Plan(
        model=q.file,
        model_bytes=model_bytes(q.file),
        n_ctx=q.n_ctx,
        n_layers=need.n_layers,
        n_blocks=need.n_blocks,
        n_experts=need.n_experts,
        n_experts_used=need.n_experts_used,
        mem_least_bytes=need.mem_least_bytes,
        mem_full_bytes=need.mem_full_bytes,
        asked=asked,
        table=tuple(sorted(rows.values(), key=lambda r: r.mem_budget_bytes)),
        prompt=prompt_of(found["asked"], asked, q.n_ctx, machine.read_bytes_per_s),
        repack=repack_of(params.use_extra_bufts, need, asked, other, other_row),
        machine=machine,
    )


@dataclasses.dataclass(frozen=True)
class Question:
    """What is planned for."""

    file: Path
    params: ModelParams
    context: ContextParams  # as its use wants it
    n_ctx: int  # tokens
    at_once: bool  # whether a text is computed in one ubatch
    n_outputs: int  # the most logits at once, 0 = of every token
    n_projector: int  # bytes of the projector, 0 = there is none


def question(
    path: str | os.PathLike[str],
    params: ModelParams | None,
    context_params: ContextParams | None,
    mem_budget: int | str | None,
    n_ctx: int | None,
    n_ubatch: int | None,
    n_threads: int | None,
    repack: bool | None,
    use: Use,
    n_parallel: int | None,
    mmproj: str | os.PathLike[str] | None,
) -> Question:
    """What the arguments of plan() ask for. Raises: as plan()."""
    model_kwargs = {"mem_budget": mem_budget, "use_extra_bufts": repack}
    context_kwargs = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_threads": n_threads}
    params = merged(ModelParams, params, {k: v for k, v in model_kwargs.items() if v is not None})
    context = merged(ContextParams, context_params, {k: v for k, v in context_kwargs.items() if v is not None})
    context, n_outputs = for_use(context, use, n_parallel)
    check_can_compute()  # measuring this CPU does
    with Model(path, vocab_only=True, progress=False) as model:
        file, n_train, at_once = model.path, model.n_ctx_train, context.at_once(model.architecture, model.metadata)
    if context.n_ctx is None:
        context = merged(ContextParams, context, {"n_ctx": min(n_train or DEFAULT_N_CTX_MAX, DEFAULT_N_CTX_MAX)})
    n_projector = projector_bytes(check_projector(mmproj)) if mmproj is not None else 0
    return Question(file, params, context, context.n_ctx or n_train, at_once, n_outputs, n_projector)


def for_use(context: ContextParams, use: Use, n_parallel: int | None) -> tuple[ContextParams, int]:
    """The parameters of a context for that use, where they are not given, and the most logits at once, 0 = of every
    token. Raises: ValueError for a use that there is not, and for sequences that it does not have.
    """
    if n_parallel is not None and (use not in ("llm", "server") or n_parallel < 1):
        raise ValueError(f"n_parallel={n_parallel}: only the uses 'llm' and 'server' have that, and at least one")
    n_given, n_parallel = n_parallel, n_parallel or 4
    n_texts = max(1, 2048 // (context.n_ctx or 512))  # that perplexity computes at once
    usual: dict[str, dict[str, Any]] = {
        "generate": {},
        "completion": {"n_batch": 2048, "swa_full": False},
        "embed": {"embeddings": True},
        "perplexity": {"n_ctx": 512, "n_batch": 2048, "n_seq_max": n_texts, "swa_full": False},
        "llm": {"n_seq_max": n_parallel, "kv_unified": True, "swa_full": False, "n_batch": 2048},
    }
    usual["server"] = {**usual["llm"], "kv_unified": n_given is None}
    if use not in usual:
        raise ValueError(f"use={use!r}: there are {', '.join(usual)}")
    if use in ("llm", "server") and context.n_ctx is None:
        usual[use]["n_ctx"] = 0  # as both: the model's own
    given = context.model_fields_set
    context = merged(ContextParams, context, {k: v for k, v in usual[use].items() if k not in given})
    if use == "perplexity":
        context = merged(ContextParams, context, {"n_ctx": (context.n_ctx or 512) * n_texts})
    return context, n_parallel if use in ("llm", "server") else 0


# ---------------------------------------------------------------- what the library and the machine say


def library_plan(
    path: Path,
    params: ModelParams,
    context: ContextParams,
    budgets: list[int],
    at_once: bool = False,
    n_outputs: int = 0,
    n_projector: int = 0,
) -> list[SimpleNamespace]:
    """A copy of the C struct superllama_plan for each budget. Raises: ModelError."""
    owned: list[Any] = []
    c = context_to_c(context, owned, at_once, n_outputs)
    m = model_to_c(params, owned, n_projector)
    out = ffi.new("struct superllama_plan[]", len(budgets))
    with collected_errors() as errors:
        status = lib.superllama_plan(os.fsencode(path), m, c, budgets, len(budgets), out)
    if status < 0:
        raise ModelError(f"cannot plan for {path}: {reason(errors, last_error())}")
    return [copied("superllama_plan", p) for p in out]


def copied(name: str, c: Any) -> SimpleNamespace:
    """The fields of a C struct, which may go then."""
    return SimpleNamespace(**{field: getattr(c, field) for field, _ in ffi.typeof(f"struct {name}").fields})


def context_to_c(context: ContextParams, owned: list[Any], at_once: bool, n_outputs: int) -> Any:
    """The C struct for a plan."""
    n_threads = context.n_threads or n_physical_cores()
    c = context.to_c(owned, n_ctx=context.n_ctx or 0, n_threads=n_threads, at_once=at_once)
    c.n_batch = max(c.n_batch, c.n_ubatch)  # the library would cut the ubatch to it
    c.n_outputs_max = n_outputs
    return c


def model_to_c(params: ModelParams, owned: list[Any], n_projector: int) -> Any:
    """The C struct for a plan."""
    m = params.to_c(owned)
    m.superllama.projector_bytes = n_projector
    m.load_mode = lib.LLAMA_LOAD_MODE_NONE  # what dynamic layers take whatever is asked; a dry run cannot map
    return m


def measure(path: Path, repack: bool, n_threads: int) -> tuple[Machine, float]:
    """This disk and this CPU; and the CPU's rate with `repack` the other way.

    Raises: ModelError if one of them cannot be measured.
    """
    try:
        disk = measure_read(path, max_bytes=READ_BYTES, max_seconds=READ_SECONDS)
    except OSError as e:
        raise ModelError(f"cannot measure how fast {path} can be read: {e}") from e
    kind = lib.superllama_py_main_type(os.fsencode(path))
    kind = lib.GGML_TYPE_F16 if kind == lib.GGML_TYPE_COUNT else kind  # a split model may begin with no layers
    # the best of some: other programs only ever make it slower
    rates = {on: max(lib.superllama_measure_cpu(kind, on, n_threads) for _ in range(3)) for on in (True, False)}
    if not all(rates.values()):
        raise ModelError(f"cannot measure this CPU: {last_error()}")
    machine = Machine(disk.bytes_per_s, disk.how, rates[repack], text(lib.ggml_type_name(kind)), n_threads)
    return machine, rates[not repack]


# ---------------------------------------------------------------- arithmetic


def expert_read_of(p: SimpleNamespace) -> int:
    """Bytes of experts that a token reads: those that it uses and that are not in the pool."""
    return int(p.expert_used_bytes * (1 - p.expert_pool_bytes / p.expert_bytes)) if p.expert_bytes else 0


def row(label: str, p: SimpleNamespace, read_rate: float, cpu_rate: float) -> Row:
    """A superllama_plan with what it takes per token."""
    expert_read, seconds_disk, seconds_cpu = 0, None, None
    if p.works:
        expert_read = expert_read_of(p)
        seconds_disk = (p.streamed_bytes + expert_read) / read_rate
        seconds_cpu = (p.fixed_bytes + p.dense_bytes + p.expert_used_bytes) / cpu_rate
    return Row(
        label=label,
        mem_budget_bytes=p.mem_budget_bytes,
        works=p.works,
        fixed_bytes=p.fixed_bytes,
        pinned_bytes=p.pinned_bytes,
        ring_bytes=p.ring_bytes,
        expert_pool_bytes=p.expert_pool_bytes,
        kv_bytes=p.kv_bytes,
        projector_bytes=p.projector_bytes,
        compute_bytes=p.compute_bytes,
        streamed_bytes=p.streamed_bytes if p.works else 0,
        expert_read_bytes=expert_read,
        tokens_per_s=None if seconds_disk is None or seconds_cpu is None else 1 / max(seconds_disk, seconds_cpu, 1e-9),
        seconds_disk=seconds_disk,
        seconds_cpu=seconds_cpu,
        limit=None if seconds_disk is None or seconds_cpu is None else "disk" if seconds_disk > seconds_cpu else "CPU",
    )


def prompt_of(p: SimpleNamespace, asked: Row, n_ctx: int, read_rate: float) -> Prompt:
    """How a prompt of PROMPT_TOKENS would be processed under the asked budget."""
    n_ubatch = p.n_ubatch
    n_tokens = min(PROMPT_TOKENS, n_ctx)
    n_passes = math.ceil(n_tokens / n_ubatch)
    if asked.seconds_cpu is None:
        return Prompt(n_tokens, n_ubatch, n_passes, None, None, None)
    # the tokens of a pass ask for many experts, at most for all that are not in the pool
    experts = min(min(n_ubatch, n_tokens) * asked.expert_read_bytes, p.expert_bytes - p.expert_pool_bytes)
    disk = n_passes * (p.streamed_bytes + experts) / read_rate
    advice = None
    if asked.streamed_bytes and n_ctx >= 2 * n_ubatch:
        advice = (
            f"prompts of more than {n_ubatch} tokens stream {asked.streamed_bytes / 1e9:.2f} GB again for every "
            f"{n_ubatch}: an ubatch of {2 * n_ubatch} would halve the passes, for a larger compute buffer"
        )
    return Prompt(
        n_tokens,
        n_ubatch,
        n_passes,
        seconds_least=max(disk, n_passes * asked.seconds_cpu),
        seconds_most=max(disk, n_tokens * asked.seconds_cpu),
        advice=advice,
    )


def repack_of(on: bool, this: SimpleNamespace, this_row: Row, other: SimpleNamespace, other_row: Row) -> Repack:
    """Whether repacked weights are worth it. `this` is planned as asked (`on`: repacked), `other` the other way."""
    (p, packed), (_, plain) = ((this, this_row), (other, other_row))[:: 1 if on else -1]
    streams = packed.read_bytes_per_token > 0 or plain.read_bytes_per_token > 0
    file_bytes = p.repacked_bytes if streams and on else 0
    if not p.repacked_bytes:
        return Repack(on, 0, "same", "this CPU has no layout of its own for the weights of this model")
    if packed.tokens_per_s is None or plain.tokens_per_s is None:
        return Repack(on, file_bytes, "same", "the budget is too small for either")
    assert packed.seconds_cpu is not None
    assert plain.seconds_cpu is not None
    kernels = plain.seconds_cpu / packed.seconds_cpu
    if streams and (room := room_for(p.repacked_bytes)) is not None:
        return Repack(
            on,
            file_bytes,
            "no-repack",
            f"the file of repacked blocks needs {p.repacked_bytes / 1e9:.1f} GB and the cache folder has room for "
            f"{room / 1e9:.1f} GB; without it every block is repacked whenever it is read",
        )
    if packed.tokens_per_s > plain.tokens_per_s * SAME:
        return Repack(
            on, file_bytes, "repack", f"the CPU is the limit, and its repacked kernels are {kernels:.2f}x as fast"
        )
    if plain.tokens_per_s > packed.tokens_per_s * SAME:
        why = f"the CPU is the limit, and its plain kernels are {1 / kernels:.2f}x as fast as the repacked ones"
        return Repack(on, file_bytes, "no-repack", why)
    if kernels > SAME:
        why = f"generation waits for the disk either way, and prompts get kernels that are {kernels:.2f}x as fast"
        return Repack(on, file_bytes, "repack", why)
    why = "generation is equally fast either way, and no file of repacked blocks has to be written"
    return Repack(
        on, file_bytes, "no-repack" if streams else "same", why if streams else "both kernels are equally fast"
    )


def room_for(n_bytes: int) -> int | None:
    """The bytes that are free where the cache folder is, if they are too few and no file of that size is there."""
    folder = cache_dir() / "repacked"
    if any(file.stat().st_size >= n_bytes for file in folder.glob("*.blocks")):
        return None
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return free if free < n_bytes else None
