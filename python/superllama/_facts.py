"""What a model is, and its texts as tokens: for a model of one's own, and for that of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from ._chat_template import ChatTemplate, is_jinja
from ._errors import TemplateError
from ._native import ffi, lib, text
from ._text import apply_template, detokenize, token_bytes, token_list, tokenize, utf8
from ._waiting import interruptible

QUICK_BYTES = 1 << 14  # a text of so many is tokenized in milliseconds: no thread is made for it


class ModelFacts:
    """Facts and texts of a native model."""

    _vocab: Any  # the model's, as the library knows it
    _vocab_only = False  # whether the library has read no more than that

    def _use(self) -> AbstractContextManager[Any]:
        """The native model, which no other thread can free meanwhile."""
        raise NotImplementedError

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {}  # that were run, by their text

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
        """Architecture, size and quantization in llama.cpp's words, such as "llama 7B Q4_K - Medium". The size is its
        guess by the number of layers (the demo model, of 135M, is "llama 256M Q4_1"); n_params counts."""
        with self._use() as c:
            return _string(lib.llama_model_desc, c)

    @cached_property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained with."""
        if self._vocab_only:  # the library reads no hyperparameters then
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
        with self._use() as c:
            if template not in self._templates:
                self._templates[template] = ChatTemplate(c, None if template == self.chat_template else template)
            return self._templates[template].prompt(messages, add_generation_prompt)


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
