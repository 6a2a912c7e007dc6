"""llama-cpp-python's class on superllama's engine: one import changes, and models larger than memory run.

    from superllama.compat import Llama                  # instead of: from llama_cpp import Llama

`install()` makes it the module `llama_cpp`, for packages that import that. Constructor, methods and the dicts that they
return are those of llama-cpp-python; options of `superllama.LLM` may be given beside (mem_budget=...). What decodes
token by token (eval() and sample()) is in superllama.Context.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__ as __version__
from ._closing import Closing
from ._engine.compat_hub import hub_file
from ._engine.compat_images import chat_format_module, projector_of
from ._engine.compat_options import THEIRS, completion_logprobs, engine_options, usage_of
from ._engine.compat_stopping import Criteria, joined
from ._engine.compat_tokens import LlamaTokenizer as LlamaTokenizer
from ._engine.compat_tokens import llama_model_get_vocab as llama_model_get_vocab
from ._engine.compat_tokens import llama_token_to_piece as llama_token_to_piece
from ._engine.llm import LLM
from ._engine.options import places_layers
from ._engine.processors import processors_of
from ._engine.results import Chunk, Completion
from ._errors import ModelError, RequestError
from ._facts import ModelFacts
from ._model import Model

LLAMA_DEFAULT_SEED = 0xFFFFFFFF


class LlamaGrammar:
    """A GBNF grammar."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = False) -> LlamaGrammar:
        """One from its text."""
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = False) -> LlamaGrammar:
        """One from a file."""
        return cls(Path(file).read_text(encoding="utf-8"))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = False) -> LlamaGrammar:
        """The form of a JSON schema; what cannot be held of it is an error of the request."""
        grammar = cls("")
        grammar.schema = json.loads(json_schema)
        return grammar

    schema: Any = None


class LogitsProcessorList(list[Any]):
    """Functions that change the scores of tokens, one after the other."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores as the last one leaves them."""
        for function in self:
            scores = function(input_ids, scores)
        return scores


class StoppingCriteriaList(list[Any]):
    """Functions that say whether a text ends before its next token."""

    def __call__(self, input_ids: Any, logits: Any) -> bool:
        """Whether one of them says so; each is asked."""
        said = [bool(function(input_ids, logits)) for function in self]
        return any(said)


@dataclasses.dataclass(frozen=True)
class LlamaState:
    """Where a Llama is in its sequence of random numbers. What it had computed is computed again."""

    random: Any


class Llama(Closing):
    """llama-cpp-python's Llama. One request at a time shares nothing with others; with n_parallel=8 several threads may
    ask at once."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        vocab_only: bool = False,
        seed: int = LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        embedding: bool = False,
        flash_attn: bool = False,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        logits_all: bool = False,
        last_n_tokens_size: int = 64,
        verbose: bool = False,
        n_parallel: int = 1,
        **options: Any,
    ) -> None:
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "options")} | options
        if projector := projector_of(chat_handler):
            options.setdefault("mmproj", projector)
            chat_handler = None
        for name, value in (("chat_handler", chat_handler), ("draft_model", draft_model), ("tokenizer", tokenizer)):
            if value is not None:
                raise ValueError(
                    f"{name} is an object of llama-cpp-python; see mmproj=, speculative= of superllama.LLM"
                )
        self.model_path = os.fspath(model_path)
        self.verbose = verbose
        self._random = random.Random(None if seed in (LLAMA_DEFAULT_SEED, -1) else seed)
        self._last_n = last_n_tokens_size
        self._llm: LLM | None = None
        self._facts: ModelFacts
        if vocab_only:
            self._facts = Model(model_path, vocab_only=True, progress=False)
            return
        for name in _IGNORED:
            options.pop(name, None)
        own = {k: options.pop(k) for k in list(options) if k in THEIRS}
        given = engine_options(own)
        if self.model_path.startswith("hf:") or not places_layers(options):
            given["n_gpu_layers"] = n_gpu_layers
        given |= {"n_ctx": n_ctx, "n_parallel": n_parallel, "embedding": embedding, "flash_attn": flash_attn}
        given |= {"n_batch": n_ubatch if embedding else n_batch, "n_ubatch": n_ubatch}
        if verbose:
            given["verbosity"] = 3
        self._llm = LLM(model_path, **(given | options))
        self._facts = self._llm.facts

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> Llama:
        """A file of a repository of Hugging Face, whose name may have * and ?. Needs the package huggingface_hub."""
        return cls(hub_file(repo_id, filename, additional_files, local_dir, cache_dir), **kwargs)

    # ---------------------------------------------------------------- text

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
    ) -> Any:
        """A completion as OpenAI's first API has it; with `stream`, an iterator of such with parts of the text."""
        _check_tfs_z(tfs_z)
        request = self._request(locals())
        request["max_tokens"] = max_tokens if max_tokens and max_tokens > 0 else None
        if suffix is not None:
            if stopping_criteria:
                raise ValueError("with a suffix there are no stopping_criteria; stop= ends a text there too")
            return self._infill(prompt, suffix, request, echo, stream, model)
        shown = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "replace")
        head = self._head("text_completion", "cmpl", model)
        prompt = prompt or [self.token_bos()]
        if stream:
            chunks = self._chunks(prompt, request, stopping_criteria)
            return self._completion_chunks(chunks, head, shown if echo else "")
        found: Completion | Chunk
        if stopping_criteria:
            found = joined(self._chunks(prompt, request, stopping_criteria))
        else:
            found = self._engine.generate(prompt, **request)
        offset = len(shown)
        choice = {
            "text": (shown if echo else "") + found.text,
            "index": 0,
            "logprobs": completion_logprobs(found.logprobs, offset) if found.logprobs else None,
            "finish_reason": found.finish_reason,
        }
        return head | {"choices": [choice], "usage": usage_of(found)}

    __call__ = create_completion

    def _chunks(self, prompt: str | list[int], request: Mapping[str, Any], stopping_criteria: Any) -> Iterator[Chunk]:
        if not stopping_criteria:
            yield from (chunk for chunk in self._engine.stream(prompt, **request) if chunk.progress is None)
            return
        criteria = Criteria(stopping_criteria)  # which see the scores as the other functions leave them
        functions = [*processors_of(request["logits_processor"]), criteria]
        chunks = self._engine.stream(prompt, **{**request, "logits_processor": functions})
        yield from criteria.until((chunk for chunk in chunks if chunk.progress is None), self.detokenize)

    def _completion_chunks(self, chunks: Iterator[Chunk], head: Mapping[str, Any], echo: str) -> Iterator[Any]:
        offset = 0
        for chunk in chunks:
            text, echo = echo + chunk.text, ""
            logprobs = completion_logprobs(chunk.logprobs, offset) if chunk.logprobs else None
            offset += len(chunk.text)
            choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
            yield {**head, "choices": [choice]}

    def _infill(
        self, prompt: Any, suffix: str, request: dict[str, Any], echo: bool, stream: bool, model: str | None
    ) -> Any:
        if stream or request.get("logprobs") is not None or not isinstance(prompt, str):
            raise ValueError("with a suffix, the prompt is a text, and neither stream nor logprobs are there")
        answer = self._engine.infill(prompt, suffix, **request)
        text = (prompt if echo else "") + answer.text + (suffix if echo else "")
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._head("text_completion", "cmpl", model) | {"choices": [choice], "usage": usage_of(answer)}

    # ---------------------------------------------------------------- conversations

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Any] | None = None,
        function_call: Any = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """An answer as OpenAI's chat API has it; with `stream`, an iterator of its chunks."""
        _check_tfs_z(tfs_z)
        if functions is not None or function_call is not None:
            raise ValueError("functions and function_call became tools and tool_choice in OpenAI's API; give those")
        request = self._request(locals() | {"logprobs": (top_logprobs or 1) if logprobs else None})
        request["max_tokens"] = max_tokens if max_tokens and max_tokens > 0 else None
        request |= {"tools": tools or (), "tool_choice": tool_choice}
        if response_format is not None and response_format.get("type") != "text":
            request["response_format"] = response_format
        found = self._engine._chat_events(messages, stream, request)
        if stream:
            return (self._renamed(event, model) for event in found)
        return self._renamed(next(iter(found)), model)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """The same as objects of the package openai."""
        from openai.types.chat import ChatCompletion, ChatCompletionChunk  # type: ignore[import-not-found,unused-ignore]

        found = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream"):
            return (ChatCompletionChunk(**chunk) for chunk in found)
        return ChatCompletion(**found)

    # ---------------------------------------------------------------- vectors

    def create_embedding(self, input: str | list[str], model: str | None = None) -> dict[str, Any]:
        """Vectors as OpenAI's API has them."""
        vectors, count = self.embed(input if isinstance(input, list) else [input], return_count=True)
        data = [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": model or self.model_path, "usage": usage}

    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """A vector for a text, a list of them for a list; one for each token where the model has no pooling."""
        texts = input if isinstance(input, list) else [input]
        tokens = [self.tokenize(text.encode(), special=True) for text in texts]
        if truncate:
            most = min(self.n_ctx(), self._arguments["n_ubatch"])  # that are computed at once
            tokens = [sequence[:most] for sequence in tokens]
        vectors = self._engine.embed(tokens, normalize=normalize)
        found = vectors if isinstance(input, list) else vectors[0]
        return (found, sum(map(len, tokens))) if return_count else found

    # ---------------------------------------------------------------- tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The tokens of a text."""
        return self._facts.tokenize(text, add_special=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of tokens."""
        if prev_tokens:
            before = self._facts.detokenize_bytes(prev_tokens, special=special)
            return self._facts.detokenize_bytes([*prev_tokens, *tokens], special=special)[len(before) :]
        return self._facts.detokenize_bytes(tokens, special=special)

    def tokenizer(self) -> LlamaTokenizer:
        """What others take for a tokenizer."""
        return LlamaTokenizer(self)

    @property
    def model(self) -> ModelFacts:
        """What llama_model_get_vocab() of this module takes."""
        return self._facts

    def token_bos(self) -> int:
        """The token that begins a text, -1 if there is none."""
        return -1 if self._facts.token_bos is None else self._facts.token_bos

    def token_eos(self) -> int:
        """The token that ends a text, -1 if there is none."""
        return -1 if self._facts.token_eos is None else self._facts.token_eos

    def n_ctx(self) -> int:
        """Tokens that a sequence may have."""
        return int(self._engine._props["default_generation_settings"]["n_ctx"])

    def n_embd(self) -> int:
        """Numbers in an embedding."""
        return self._facts.n_embd

    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self._facts.n_vocab

    @property
    def context_params(self) -> types.SimpleNamespace:
        """What others look up of the context: `n_ctx`, `n_batch`, `n_ubatch`."""
        return types.SimpleNamespace(n_ctx=self.n_ctx(), **{k: self._arguments[k] for k in ("n_batch", "n_ubatch")})

    @property
    def model_params(self) -> types.SimpleNamespace:
        """What others look up of the model: `n_gpu_layers`, `vocab_only`."""
        return types.SimpleNamespace(**{k: self._arguments[k] for k in ("n_gpu_layers", "vocab_only")})

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return self._facts.metadata

    # ---------------------------------------------------------------- state

    def set_seed(self, seed: int) -> None:
        """Begin a sequence of random numbers."""
        self._random = random.Random(seed)

    def save_state(self) -> LlamaState:
        """Where this is in its sequence of random numbers."""
        return LlamaState(self._random.getstate())

    def load_state(self, state: LlamaState) -> None:
        """Go back there."""
        self._random.setstate(state.random)

    def reset(self) -> None:
        """Nothing: each request begins anew, and goes on from what was computed of the same beginning."""

    def set_cache(self, cache: Any) -> None:
        """Nothing: the engine keeps prompts by itself (cache_ram=)."""

    def close(self) -> None:
        """Free the model."""
        if self._llm is not None:
            self._llm.close()
        elif isinstance(self._facts, Model):
            self._facts.close()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # ---------------------------------------------------------------- how requests are made

    @property
    def _engine(self) -> LLM:
        if self._llm is None:
            raise ModelError("this Llama has the vocabulary only (vocab_only=True)")
        return self._llm

    def _request(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request that both kinds have."""
        names = ("temperature", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "top_k")
        request = {name: given[name] for name in names}
        request["top_k"] = max(0, request["top_k"])  # -1 is all there, too
        request |= {"repeat_penalty": given["repeat_penalty"], "penalty_last_n": self._last_n}
        request |= {"stop": given["stop"] or None, "logprobs": given["logprobs"] or None}
        request |= {"mirostat": given["mirostat_mode"], "mirostat_tau": given["mirostat_tau"]}
        request |= {"mirostat_eta": given["mirostat_eta"], "logit_bias": given["logit_bias"] or None}
        request["logits_processor"] = given["logits_processor"] or None
        seed = given["seed"]
        drawn = seed is None or seed < 0 or seed == LLAMA_DEFAULT_SEED
        request["seed"] = self._random.getrandbits(31) if drawn else seed
        grammar = given["grammar"]
        if grammar is not None:
            key, value = (
                ("response_format", grammar.schema) if grammar.schema is not None else ("grammar", grammar.text)
            )
            request[key] = value
        if request["logit_bias"]:
            request["logit_bias"] = {int(token): bias for token, bias in request["logit_bias"].items()}
        return request

    def _head(self, kind: str, prefix: str, model: str | None) -> dict[str, Any]:
        name = model or self.model_path
        return {"id": f"{prefix}-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": name}

    def _renamed(self, answer: dict[str, Any], model: str | None) -> dict[str, Any]:
        return {**answer, "model": model or self.model_path}


_IGNORED = ("n_parts", "f16_kv", "low_vram", "mul_mat_q")  # of former versions, which later ones ignore as well


llama_chat_format = chat_format_module()


def _check_tfs_z(tfs_z: float) -> None:
    if tfs_z not in (0, 1):
        raise ValueError("tfs_z: llama.cpp has removed tail-free sampling; leave it at 1.0")


def install() -> None:
    """Make this the module `llama_cpp`, for packages that import that one.

    Raises: RequestError if another one is imported already.
    """
    this = sys.modules[__name__]
    if sys.modules.get("llama_cpp", this) is not this:
        raise RequestError("llama_cpp is imported already; call install() before that")
    sys.modules["llama_cpp"] = this
    sys.modules["llama_cpp.llama_chat_format"] = llama_chat_format
