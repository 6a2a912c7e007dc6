"""One engine and its requests: made, used from any thread, stopped."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._closing import Closing
from .._errors import CancelledError, Error, ModelError, PausedError, PreemptedError, PromptError, RequestError
from .._native import collected_errors, ffi, lib, raise_kept, reason
from .._process import check_can_compute, check_process, inherited, stop_at_exit, this_process
from .._progress import LoadProgress
from .._waiting import interruptible
from .._words import in_python
from .failures import failure
from .library import address, last_error, library
from .processors import LogitsProcessor, Processors, runs_here

WITHOUT_SLOTS = ("/tokenize", "/detokenize", "/apply-template")
POLL_MS = 100  # Python's main thread hears Ctrl-C between two of these


class Handle:
    """A native engine. `arguments` are flags of superllama-server.

    Raises: ModelError with the reason where it does not start, CancelledError if `progress` stopped it.
    """

    def __init__(self, arguments: Sequence[str], name: str, load: LoadProgress) -> None:
        check_can_compute()
        self.name = name
        self._process = this_process()
        self._lock = threading.Lock()  # between a request's beginning and the engine's end
        self._looking = threading.RLock()  # between that and who looks at the model, or changes its budget
        self._c: int | None = interruptible(
            lambda: _start(arguments, name, load), stop=load.cancel, undo=library().superllama_engine_stop
        )
        stop_at_exit(self)

    @property
    def closed(self) -> bool:
        """Whether it has been stopped."""
        return self._c is None

    def close(self) -> None:
        """Cancel what runs and free the model. Twice is fine; in a fork nothing is freed: it is the parent's."""
        if inherited(self._process):
            self._c = None
            return
        with self._looking, self._lock:
            pointer, self._c = self._c, None
        if pointer is not None and runs_here(self):  # which cannot wait for itself
            threading.Thread(target=library().superllama_engine_stop, args=(pointer,)).start()
        elif pointer is not None:
            library().superllama_engine_stop(pointer)

    def _stop(self, seconds: float) -> bool:
        self.close()
        return True

    def _abandon(self) -> None:
        self._c = None

    def __del__(self) -> None:
        if getattr(self, "_c", None) is not None:
            self.close()

    # ---------------------------------------------------------------- what it runs on

    @contextlib.contextmanager
    def using(self) -> Iterator[tuple[Any, Any]]:
        """The native model and context, as cffi knows them, which nobody frees meanwhile.

        Raises: PausedError while the memory is given back.
        """
        with self._looking:
            c = self._checked()
            held = library().superllama_engine_hold(c)
            if not held:
                raise PausedError(f"{self.name} has given its memory back; resume() takes it again")
            try:
                context = ffi.cast("struct llama_context *", held)
                yield ffi.cast("struct llama_model *", lib.llama_get_model(context)), context
            finally:
                library().superllama_engine_release(c)

    def _checked(self) -> int:
        check_process(self._process, "this engine")
        if self._c is None:
            raise ModelError(f"{self.name} is closed")
        return self._c

    # ---------------------------------------------------------------- requests

    def submit(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Request:
        """Start a request. Raises: ModelError if the engine is closed, Error where the system has no thread for it,
        PromptError for text that is not UTF-8, ValueError for a number that JSON does not have, RequestError in a
        processor, for what would wait for the thread that it runs in."""
        if runs_here(self) and path not in WITHOUT_SLOTS:
            raise RequestError(
                "a logits_processor was asked for by this engine, and would wait for it; ask another engine, or before"
            )
        data = b"" if body is None else _json(body)
        own = Processors(processors, self) if processors else None
        words = (method.encode(), path.encode(), data, len(data))
        with self._lock:
            c = self._checked()
            if own is None:
                request = library().superllama_engine_submit(c, *words)
            else:
                callback = ctypes.cast(own.callback, ctypes.c_void_p)
                request = library().superllama_engine_submit_with(c, *words, callback, None)
        if not request:
            raise Error(f"the request cannot begin: {last_error()}; fewer at once may work")
        return Request(request, own)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a whole answer. Ctrl-C cancels the request. Raises: what the answer says."""
        with self.submit(method, path, body) as request:
            return whole_answer(b"".join(request.pieces()), request.status)


def _json(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(body), allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise PromptError(f"the request has text that is not UTF-8: {e.object[e.start]!r}, {e.reason}") from e


class Request(Closing):
    """A request that runs. Leaving the with block cancels it where it has not ended."""

    def __init__(self, pointer: int, processors: Processors | None = None) -> None:
        self._c: int | None = pointer
        self._processors = processors  # lives as long as the engine may call it
        self._reader = threading.Lock()  # one reads at a time, and none while it is freed

    def __del__(self) -> None:
        self.close()

    def cancel(self) -> None:
        """Ask it to end; the reader gets what has come so far, then the error."""
        if self._c is not None:
            library().superllama_request_cancel(self._c)

    def close(self) -> None:
        """Cancel it where it runs, and free it."""
        self.cancel()
        with self._reader:
            pointer, self._c = self._c, None
        if pointer is not None:
            library().superllama_request_free(pointer)

    @property
    def status(self) -> int:
        """Its HTTP status; 0 = no answer yet."""
        return 0 if self._c is None else int(library().superllama_request_status(self._c))

    def poll(self, timeout_ms: int = POLL_MS) -> bytes | None:
        """The next piece; b"" at the end, None where none came in time."""
        data, size = ctypes.c_void_p(), ctypes.c_size_t()
        with self._reader:
            if self._c is None:
                return b""
            found = library().superllama_request_next(self._c, timeout_ms, ctypes.byref(data), ctypes.byref(size))
            if found < 0:
                return None
            return ctypes.string_at(data.value or 0, size.value) if found else b""

    def pieces(self) -> Iterator[bytes]:
        """The pieces of the answer as they come."""
        while (piece := self.poll()) != b"":
            if piece is not None:
                yield piece

    def whole(self, timeout_ms: int) -> Any:
        """The answer's JSON, None where it has not come in time, the error where it was ended for others. Raises: what
        it says."""
        piece = self.poll(timeout_ms)
        if piece is None:
            return None
        try:
            return self.answer_of(piece)  # all of it: answers that do not stream are one piece
        except PreemptedError as e:
            return e

    def events(self) -> Iterator[Any]:
        """The JSON of each event of an answer that streams. Raises: what an event, or the whole answer, says."""
        for piece in self.pieces():
            yield from self.events_of(piece)

    def answer_of(self, data: bytes) -> Any:
        """The JSON of a whole answer. Raises: what it says, or what a logits_processor has raised."""
        try:
            return whole_answer(data, self.status)
        except Error as e:
            raise self._cause_of(e) from None

    def events_of(self, piece: bytes) -> Iterator[Any]:
        """The JSON of the events in a piece. Raises: what an event says, or what a logits_processor has raised, after
        what came before it."""
        events = _events_of(piece, self.status)
        while True:
            try:
                event = next(events, None)
            except Error as e:
                raise self._cause_of(e) from None
            if event is None:
                return
            yield event

    def _cause_of(self, error: Error) -> BaseException:
        own = None if self._processors is None else self._processors.error
        return error if own is None else own


def whole_answer(data: bytes, status: int) -> Any:
    """The JSON of an answer. Raises: what it says if it is an error."""
    text = data.decode("utf-8", "replace")
    if status == 200 and not text.startswith("{") and not text.startswith("["):
        return text  # of /metrics
    answer = json.loads(text)
    if status not in (200, 202):  # 202: it will be so
        raise failure(answer.get("error", answer))
    return answer


def _events_of(piece: bytes, status: int) -> Iterator[Any]:
    """The JSON of the events in a piece of a streamed answer. Raises: what an error among them says."""
    if status != 200 and not piece.startswith(b"data:"):
        raise failure(json.loads(piece)["error"])
    for event in piece.decode("utf-8", "replace").split("\n\n"):
        if not event.startswith("data: ") or event == "data: [DONE]":
            continue
        answer = json.loads(event[6:])
        if isinstance(answer, dict) and "error" in answer:
            raise failure(answer["error"])
        yield answer


def _start(arguments: Sequence[str], name: str, load: LoadProgress) -> int:
    words = [os.fsencode(argument) for argument in arguments]
    array = (ctypes.c_char_p * len(words))(*words)
    engine = library()
    with load.running(), collected_errors() as errors:
        pointer = engine.superllama_engine_start(
            len(words), array, address(lib.superllama_py_progress), address(load.handle)
        )
        raise_kept()
    if not pointer:
        if load.error is not None:
            raise load.error
        if load.cancelled:
            raise CancelledError(f"loading {name} was stopped by the progress callback")
        why = in_python(last_error())
        if "--mmproj" in arguments and "no reason" in why:
            why += "; perhaps mmproj= is the projector of another model"
        raise ModelError(f"cannot start {name}: {reason(errors, why)}")
    return int(pointer)
