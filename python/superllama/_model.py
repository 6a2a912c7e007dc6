"""A model: its weights and its vocabulary, shared by all contexts made on it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ._budgets import change_budgets
from ._closing import Closing
from ._errors import CancelledError, ModelError
from ._experts import Experts, experts_of
from ._facts import ModelFacts
from ._files import open_files_hint
from ._gguf import check_gguf
from ._layers import Layer, layers_of, memory_by_tag
from ._native import collected_errors, ffi, last_error, lib, raise_kept, reason
from ._params import ModelParams, merged
from ._process import check_process, inherited, stop_at_exit, this_process
from ._progress import LoadBar, LoadProgress, ProgressCallback, bar_for
from ._waiting import interruptible


class _Closable(Protocol):
    """What a model has to know of its contexts, which know the model."""

    def close(self) -> None: ...


class Model(Closing, ModelFacts):
    """A model from a GGUF file (the first part, if it is split), or by a name of `superllama list`.

    `params` and keyword arguments are the fields of ModelParams; keywords win. `progress` is called with 0.0
    to 1.0 while loading, perhaps in another thread, and stops it by returning False; by default a terminal gets a bar
    for loads longer than a second; `progress=False` shows nothing.

    A model may be used from several threads. It is freed by close(), at the end of a with block, or when it
    and its contexts are no longer referred to. Ctrl-C stops a load, also while it writes the file of repacked blocks.

    Raises: ModelError if the file cannot be loaded, CancelledError if `progress` stopped it. In a fork of the process
    that loaded it, every use of a model raises ForkedError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        params: ModelParams | None = None,
        *,
        progress: ProgressCallback | bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.params = merged(ModelParams, params, kwargs)
        self.path = check_gguf(path)
        self._process = this_process()
        self._lock = threading.RLock()
        self._contexts: weakref.WeakSet[_Closable] = weakref.WeakSet()

        owned: list[Any] = []
        c = self.params.to_c(owned)
        bar: LoadBar | None = bar_for(self.path.name) if progress in (None, True) else None
        load = LoadProgress(progress if callable(progress) else bar)
        c.progress_callback = lib.superllama_py_progress
        c.progress_callback_user_data = load.handle
        with contextlib.closing(bar) if bar else contextlib.nullcontext():
            pointer = interruptible(lambda: _load(self.path, c, load), stop=load.cancel, undo=lib.llama_model_free)
        self._c = pointer
        self._vocab = lib.llama_model_get_vocab(pointer)
        self._vocab_only = self.params.vocab_only
        self._free = weakref.finalize(self, _free_model, pointer, self._process, owned)
        stop_at_exit(self)
        self.params.log_implied()

    # ---------------------------------------------------------------- life

    @property
    def closed(self) -> bool:
        """Whether the native memory is freed."""
        return not self._free.alive

    def close(self) -> None:
        """Close the contexts on this model, then free it. Closing twice is fine. In a fork of the process that loaded
        it, the model is closed and nothing is freed: its memory is the parent's.

        Raises: ConcurrentUseError if another thread is using one of the contexts; the model stays open then.
        """
        if inherited(self._process):
            self._free.detach()
            return
        with self._lock:
            for context in list(self._contexts):
                context.close()
            self._free()

    def _stop(self, seconds: float) -> bool:
        return self._lock.acquire(timeout=seconds)  # and keep it

    def _abandon(self) -> None:
        self._free.detach()

    def __repr__(self) -> str:
        return f"<superllama.Model {self.path.name}{' (closed)' if self.closed else ', ' + self.description}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: what its memory is for, and where its layers are."""
        from ._look.html import shown

        return shown(self.path.name, self._status)

    def _status(self) -> dict[str, Any]:
        with self._use() as c:
            layers = [dataclasses.asdict(layer) for layer in layers_of(c)]
            budget = _mem_budget(c) if layers else 0
            facts, experts = [self.description], experts_of(c).as_dict()
            return {"tags": memory_by_tag(c), "layers": layers, "budget": budget, "facts": facts, "experts": experts}

    @contextlib.contextmanager
    def _use(self) -> Iterator[Any]:
        """The native model, which no other thread can free meanwhile."""
        check_process(self._process, "this model")
        try:
            with self._lock:
                if self.closed:
                    raise ModelError(f"the model {self.path.name} is closed")
                yield self._c
        finally:
            raise_kept()

    # ---------------------------------------------------------------- dynamic layers

    def layers(self) -> list[Layer]:
        """Where each layer is now; empty for a model that was loaded without dynamic_layers."""
        with self._use() as c:
            return layers_of(c)

    def experts(self) -> Experts:
        """How often each expert was chosen since the load, and where each is now; of shape [0, 0] for a model without
        experts, or one that was loaded without dynamic_layers.

        Raises: ModelError if the model is closed.
        """
        with self._use() as c:
            return experts_of(c)

    def memory(self) -> dict[str, int]:
        """Bytes of host memory in use now, by what they are for: weights ("resident", "rows", "pinned", "ring",
        "experts"), "vocabulary", "staging", "kv", "compute", "cpu_work", "outputs", "adapters", "uploads",
        "prompt_cache", "projector" and "page_tables". Their sum is what the budget holds. All 0 for a model that was
        loaded without dynamic_layers.
        """
        with self._use() as c:
            return memory_by_tag(c)

    def set_budget(
        self, mem_budget: int | str | None = None, *, vram: int | str | Sequence[int | str] | None = None
    ) -> None:
        """Change the memory that this model and its contexts may use; None changes nothing.

        `mem_budget` is of the host: bytes, "8GiB", "60%" or "auto". `vram` is of devices: one size for all of them,
        or one for each, in the order of the model's devices; "auto" follows what is free, 0 leaves no layer there.
        Layers move to and from devices before this returns.

        May be called while a context generates; what is too much then is given back before its next batch.

        Raises: pydantic.ValidationError for a text that is no size, ModelError for a budget that cannot work,
        with the least that would, a layer that could not be moved, or a model without dynamic_layers. What could
        not be done changes nothing: several budgets change together, or none of them does.
        """
        with self._use() as c:
            change_budgets(c, mem_budget, vram)

    # ---------------------------------------------------------------- adapters

    def load_lora(self, path: str | os.PathLike[str]) -> Lora:
        """Load a LoRA adapter for Context.set_lora(). Its memory is freed with the model.

        Raises: ModelError if the file cannot be loaded or was made for another model.
        """
        file = check_gguf(path)
        with self._use() as c, collected_errors() as errors:
            pointer = lib.llama_adapter_lora_init(c, os.fsencode(file))
            if pointer == ffi.NULL:
                raise ModelError(f"cannot load the adapter {file}: {reason(errors, 'the library gives no reason')}")
        return Lora(self, file.name, pointer)


class Lora:
    """A LoRA adapter that Model.load_lora() has loaded."""

    def __init__(self, model: Model, name: str, pointer: Any) -> None:
        self.model = model
        self.name = name
        self._c = pointer

    def __repr__(self) -> str:
        return f"<superllama.Lora {self.name}>"


def _load(path: Path, params: Any, load: LoadProgress) -> Any:
    """The native model. Raises: what Model does, and what the progress callback raised."""
    with load.running(), collected_errors() as errors:
        pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
    if pointer == ffi.NULL:
        if load.error is not None:
            raise load.error
        if load.cancelled:
            raise CancelledError(f"loading {path} was stopped by the progress callback")
        why = reason(errors, "the library gives no reason")
        raise ModelError(f"cannot load {path}: {why}{open_files_hint(*errors)}")
    return pointer


def _mem_budget(model: Any) -> int:
    """As it was given last; 0 for "auto"."""
    given = ffi.new("struct superllama_model_params *")
    if lib.superllama_budgets(model, ffi.addressof(given, "mem_budget_bytes"), given.vram_budget_bytes) < 0:
        raise ModelError(f"the library cannot tell what the budgets are: {last_error()}")
    return int(given.mem_budget_bytes)


def _free_model(pointer: Any, made_in: int, owned: list[Any]) -> None:
    if not inherited(made_in):
        lib.llama_model_free(pointer)
    owned.clear()  # what the parameters point to
