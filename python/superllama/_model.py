"""A model: its weights and its vocabulary, shared by all contexts made on it."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ._budgets import Budgets
from ._chat_template import ChatTemplate, is_jinja
from ._errors import CancelledError, ModelError, TemplateError
from ._files import open_files_hint
from ._gguf import check_gguf
from ._layers import Layer, layers_of, memory_by_tag
from ._native import collected_errors, ffi, lib, raise_kept, reason, text
from ._params import ModelParams, merged
from ._process import check_process, inherited, stop_at_exit, this_process
from ._progress import LoadBar, LoadProgress, ProgressCallback, bar_for
from ._text import apply_template, detokenize, token_bytes, token_list, tokenize, utf8
from ._waiting import interruptible

if TYPE_CHECKING:
    from typing_extensions import Self


QUICK_BYTES = 1 << 14  # a text of so many is tokenized in milliseconds: no thread is made for it


class _Closable(Protocol):
    """What a model has to know of its contexts, which know the model."""

    def close(self) -> None: ...


class Model:
    """A model from a GGUF file (the first part, if it is split).

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
        self._free = weakref.finalize(self, _free_model, pointer, self._process, owned)
        self._budgets = Budgets(self.params)
        self._templates: dict[str, ChatTemplate] = {}
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<superllama.Model {self.path.name}{' (closed)' if self.closed else ', ' + self.description}>"

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

    # ---------------------------------------------------------------- facts

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file as texts; arrays are abbreviated by the library."""
        with self._use() as c:
            count = lib.llama_model_meta_count(c)
            keys = [_string(lib.llama_model_meta_key_by_index, c, i) for i in range(count)]
            return {key: _string(lib.llama_model_meta_val_str_by_index, c, i) for i, key in enumerate(keys)}

    @property
    def architecture(self) -> str:
        """The name that llama.cpp has for it, for example "llama"."""
        return self.metadata.get("general.architecture", "")

    @cached_property
    def description(self) -> str:
        """Architecture, size and quantization, for example "llama 135M Q4_1"."""
        with self._use() as c:
            return _string(lib.llama_model_desc, c)

    @cached_property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained with."""
        if self.params.vocab_only:  # the library reads no hyperparameters then
            return int(self.metadata.get(f"{self.architecture}.context_length", 0))
        with self._use() as c:
            return int(lib.llama_model_n_ctx_train(c))

    @cached_property
    def n_embd(self) -> int:
        """Numbers in an embedding."""
        with self._use() as c:
            return int(lib.llama_model_n_embd_out(c))

    @cached_property
    def n_layer(self) -> int:
        """Layers."""
        with self._use() as c:
            return int(lib.llama_model_n_layer(c))

    @cached_property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary; ids are 0 to n_vocab - 1."""
        with self._use():
            return int(lib.llama_vocab_n_tokens(self._vocab))

    @cached_property
    def n_params(self) -> int:
        """Weights."""
        with self._use() as c:
            return int(lib.llama_model_n_params(c))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        with self._use() as c:
            return int(lib.llama_model_size(c))

    @cached_property
    def token_bos(self) -> int | None:
        """The token that begins a text, None if the vocabulary has none."""
        with self._use():
            return _token(lib.llama_vocab_bos(self._vocab))

    @cached_property
    def token_eos(self) -> int | None:
        """The token that ends a text, None if the vocabulary has none."""
        with self._use():
            return _token(lib.llama_vocab_eos(self._vocab))

    def is_eog(self, token: int) -> bool:
        """Whether a model that produces this token has finished."""
        with self._use():
            (token,) = token_list([token])
            return 0 <= token < self.n_vocab and bool(lib.llama_vocab_is_eog(self._vocab, token))

    # ---------------------------------------------------------------- dynamic layers

    def layers(self) -> list[Layer]:
        """Where each layer is now; empty for a model that was loaded without dynamic_layers."""
        with self._use() as c:
            return layers_of(c)

    def memory(self) -> dict[str, int]:
        """Bytes of host memory in use now, by what they are for: weights ("resident", "rows", "pinned", "ring",
        "experts"), "vocabulary", "staging", "kv", "compute", "cpu_work", "outputs", "adapters", "uploads",
        "prompt_cache" and "page_tables". Their sum is what the budget holds. All 0 for a model that was loaded without
        dynamic_layers.
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
            self._budgets.change(c, mem_budget, vram)

    # ---------------------------------------------------------------- text

    def tokenize(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of a text. `add_special` adds BOS and EOS where the model wants them, `parse_special`
        reads texts like "<|im_end|>" as the tokens they name.

        Raises: PromptError for a text that is not UTF-8, or that is no text.
        """
        data = utf8(text)

        def work() -> list[int]:
            return tokenize(self._vocab, data, add_special, parse_special)

        if len(data) > QUICK_BYTES:  # seconds, of which the library cannot be asked to stop
            return interruptible(work, stop=None, undo=lambda tokens: None, within=self._use)
        with self._use():
            return work()

    def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD. `special` shows control tokens too.

        Raises: PromptError for a token that is not in the vocabulary.
        """
        return self.detokenize_bytes(tokens, special=special).decode("utf-8", "replace")

    def detokenize_bytes(self, tokens: Sequence[int], *, special: bool = True) -> bytes:
        """The text of tokens as the bytes that it is; see detokenize()."""
        with self._use():
            return detokenize(self._vocab, tokens, self.n_vocab, special)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token inside a text, perhaps a part of a character; b"" for a control token."""
        with self._use():
            return token_bytes(self._vocab, token, self.n_vocab, special)

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja), None if it has none."""
        with self._use() as c:
            return text(lib.llama_model_chat_template(c, ffi.NULL)) or None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, template: str | None = None
    ) -> str:
        """The prompt for a conversation: [{"role": "user", "content": "Hello"}, ...].

        Messages are those of OpenAI's API: a content may be a list of text parts, or None beside `tool_calls`. A last
        message of the assistant is gone on with. `template` is Jinja, or the name of one that the library knows
        ("chatml", "llama3", ...); default is the model's own. The prompt is the one that llama-server makes; the token
        that begins a text is not in it where tokenize() adds it.

        Raises: TemplateError if there is no template, or none that the library knows, or it refuses the messages.
        """
        template = template or self.chat_template
        if template is None:
            raise TemplateError("this model has no chat template; use generate(), or name one, e.g. template='chatml'")
        if not is_jinja(template):
            return apply_template(template, messages, add_generation_prompt)
        with self._use():
            bos, eos = (self._vocab_text(token) for token in (self.token_bos, self.token_eos))
            adds_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
            adds_eos = bool(lib.llama_vocab_get_add_eos(self._vocab))
        if template not in self._templates:
            self._templates[template] = ChatTemplate(template, bos, eos)
        prompt = self._templates[template].prompt(messages, add_generation_prompt)
        prompt = prompt.removeprefix(bos) if adds_bos else prompt
        return prompt.removesuffix(eos) if adds_eos else prompt

    def _vocab_text(self, token: int | None) -> str:
        return "" if token is None else self.token_bytes(token, special=True).decode("utf-8", "replace")

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


def _free_model(pointer: Any, made_in: int, owned: list[Any]) -> None:
    if not inherited(made_in):
        lib.llama_model_free(pointer)
    owned.clear()  # what the parameters point to


def _token(token: int) -> int | None:
    return None if token == lib.LLAMA_TOKEN_NULL else token


def _string(function: Any, *args: Any) -> str:
    """The text that a function of the kind snprintf writes."""
    size = 256
    while True:
        buffer = ffi.new("char[]", size)
        n = function(*args, buffer, size)
        if n < size:
            return bytes(ffi.buffer(buffer, max(n, 0))).decode("utf-8", "replace")
        size = n + 1
