"""The native context: made, guarded against use from two threads and from a fork, freed."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._closing import Closing
from ._errors import ConcurrentUseError, ContextError
from ._kv_size import check_kv_fits
from ._memory import n_physical_cores
from ._model import Model
from ._native import collected_errors, ffi, lib, raise_kept, reason
from ._params import ContextParams, merged
from ._process import check_can_compute, check_process, inherited, stop_at_exit, this_process
from ._waiting import interruptible

if TYPE_CHECKING:
    pass

DEFAULT_N_CTX_MAX = 4096
STOP_POLL_S = 0.02  # how often a context that shall stop is told so: cancel() has no effect on what begins after it


class ContextBase(Closing):
    """Life and limits of a context; Context adds what it can do."""

    def __init__(
        self, model: Model | str | os.PathLike[str], params: ContextParams | None = None, **kwargs: Any
    ) -> None:
        self.params = merged(ContextParams, params, kwargs)
        self._process = this_process()
        if isinstance(model, Model):
            check_process(model._process, "this model")
        check_can_compute()
        self._owned_model = None if isinstance(model, Model) else Model(model)
        self.model: Model = model if isinstance(model, Model) else self._owned_model  # type: ignore[assignment]
        self._lock = threading.Lock()
        self._at_once = self.params.at_once(self.model.architecture, self.model.metadata)
        self._abort_flag = ffi.new("struct superllama_py_abort *")
        try:
            self._c = self._create()
        except Exception:  # after Ctrl-C the model may be in use still: it is closed where that ends
            if self._owned_model:
                self._owned_model.close()
            raise
        self._free = weakref.finalize(self, _free_context, self._c, self._process, self._abort_flag, self.model)
        self.model._contexts.add(self)
        stop_at_exit(self)
        self.params.log_implied()

        self._memory = lib.llama_get_memory(self._c)
        self._n_ctx = int(lib.llama_n_ctx(self._c))
        self._n_ctx_seq = int(lib.llama_n_ctx_seq(self._c))
        self._n_batch = int(lib.llama_n_batch(self._c))
        self._n_ubatch = int(lib.llama_n_ubatch(self._c))

    def _create(self) -> Any:
        params, model = self.params, self.model
        if model.params.vocab_only:
            raise ContextError(f"{model.path.name} was loaded with vocab_only=True and has no weights to compute with")
        n_ctx = params.n_ctx
        if n_ctx is None:
            n_ctx = min(model.n_ctx_train or DEFAULT_N_CTX_MAX, DEFAULT_N_CTX_MAX)
        check_kv_fits(model, params, n_ctx or model.n_ctx_train)

        owned: list[Any] = []
        c = params.to_c(owned, n_ctx=n_ctx, n_threads=n_physical_cores(), at_once=self._at_once)
        c.abort_callback = ffi.addressof(lib, "superllama_py_abort_if_set")
        c.abort_callback_data = self._abort_flag

        def make() -> Any:
            with collected_errors() as errors:
                pointer = lib.llama_init_from_model(model._c, c)
            if pointer == ffi.NULL:
                raise ContextError(f"cannot make a context: {reason(errors, 'the library gives no reason')}")
            return pointer

        flag, made_in, owned_model = self._abort_flag, self._process, self._owned_model

        def undo(pointer: Any) -> None:
            _free_context(pointer, made_in, flag, model)
            owned.clear()  # what the parameters point to, which lives as long as this function
            if owned_model:
                owned_model.close()

        # the library does not ask here whether it shall stop; Model.close() waits until a context that nobody waits for
        # any more is freed
        return interruptible(make, stop=None, undo=undo, within=model._use)

    # ---------------------------------------------------------------- life

    @property
    def closed(self) -> bool:
        """Whether the native memory is freed."""
        return not (free := getattr(self, "_free", None)) or not free.alive

    def close(self) -> None:
        """Free the context, and the model if the context loaded it. Closing twice is fine. In a fork of the process
        that made it, the context is closed and nothing is freed: its memory is the parent's.

        Raises: ConcurrentUseError if another thread is using the context.
        """
        if inherited(self._process):
            self._free.detach()
            return
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError("another thread is using this context; let it finish (cancel() helps), then close")
        try:
            self._free()
            self.model._contexts.discard(self)
        finally:
            self._lock.release()
        if self._owned_model:
            self._owned_model.close()

    def cancel(self) -> None:
        """Stop what another thread is doing with this context."""
        self._abort_flag.set = 1

    def _stop(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        self.cancel()
        while not self._lock.acquire(timeout=STOP_POLL_S):  # and keep it: nothing begins any more
            self.cancel()
            if time.monotonic() > deadline:
                return False
        return True

    def _abandon(self) -> None:
        self._free.detach()
        self.model._abandon()

    def __repr__(self) -> str:
        return f"<superllama.Context {self.model.path.name}, {'closed' if self.closed else f'n_ctx={self._n_ctx}'}>"

    # ---------------------------------------------------------------- guard

    @contextlib.contextmanager
    def _use(self) -> Iterator[Any]:
        """The native context, which nobody else uses meanwhile: two calls at the same time raise.

        Calls of several threads one after the other are fine, also between two pieces of a generator. One that changes
        the generator's sequence is found by its next piece, and everything else that a piece needs is computed in it.
        """
        check_process(self._process, "this context")
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                "two threads use this context at the same time; make a context for each thread, they share the model"
            )
        try:
            if self.closed:
                raise ContextError("this context is closed")
            yield self._c
        finally:
            self._lock.release()
            raise_kept()

    def _check_seq(self, seq: int) -> int:
        n = self.params.n_seq_max
        if not 0 <= integer(seq, "a sequence") < n:
            raise ContextError(
                f"there is no sequence {seq}: this context has {n} (0 to {n - 1}); make it with a larger n_seq_max"
            )
        return seq

    # ---------------------------------------------------------------- limits

    @property
    def n_ctx(self) -> int:
        """Tokens that all sequences can hold together."""
        return self._n_ctx

    @property
    def n_ctx_seq(self) -> int:
        """Tokens that one sequence can hold."""
        return self._n_ctx_seq

    @property
    def n_batch(self) -> int:
        """Tokens in one call of the library."""
        return self._n_batch

    @property
    def n_ubatch(self) -> int:
        """Tokens computed at once."""
        return self._n_ubatch

    @property
    def n_seq_max(self) -> int:
        """Sequences; their numbers are 0 to n_seq_max - 1."""
        return self.params.n_seq_max


def integer(value: object, what: str) -> int:
    """The value, if it is a whole number, of numpy's too. Raises: ContextError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ContextError(f"{what} is a whole number, not {value!r}") from None


def _free_context(pointer: Any, made_in: int, flag: Any, model: Model) -> None:
    """`flag` and `model` are arguments so that they live until here."""
    if not inherited(made_in):
        lib.llama_free(pointer)
