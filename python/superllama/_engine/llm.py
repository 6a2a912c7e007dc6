"""LLM: an engine for threads that wait."""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .._errors import PreemptedError
from .._experts import experts_of
from .._layers import layers_of
from .._metrics import metrics_of
from .._progress import ProgressCallback
from . import calls, conversation, text, vectors
from .base import Base
from .calls import Call, Prompt, Stream
from .handle import POLL_MS, Request
from .names import rest_by_name
from .results import ChatCompletion, Chunk, Completion, Ranked
from .spans import Span, ending

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .fields import Conversation, Generation
    from .options import EngineOptions

T = TypeVar("T")
SWEEP_MS = 10  # how long one of several requests is waited for before the others are looked at
PREEMPTED_S = 0.05  # before a request that had to make room for another caller's begins again

Messages = str | Sequence[Mapping[str, Any]]


class LLM(Base):
    """A model that serves many requests at once: prompts of a list, and calls of other threads, share each pass over
    the weights, and each prompt goes on from what was computed of the same beginning before.

    `model` is a GGUF file, a name of `superllama list`, or "hf:org/repo:Q4_K_M", which is fetched once. Keyword
    arguments are those of EngineOptions, and any other flag of superllama-server by its name with underscores. A model
    that has no room in memory streams (dynamic_layers), unless that, async_prefetch or a budget is given. Where layers
    are dynamic, by a budget or by name, async_prefetch is on unless it is given.

    May be used from any thread. It is freed by close(), at the end of a with block, or when nothing refers to it.

    Raises: ModelError if it cannot be loaded, DownloadError if it cannot be fetched, TypeError for a parameter that
    does not exist.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        progress: ProgressCallback | bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, progress, dict(options))

    def _repr_html_(self) -> str:
        """What a notebook shows: what its memory is for, and where its layers are."""
        from .._look.html import shown

        return shown(Path(self.model).name, self._status)

    def _status(self) -> dict[str, Any]:
        with self._engine.using() as (model, context):
            layers = [dataclasses.asdict(layer) for layer in layers_of(model)]
            metrics = metrics_of(context)
            facts = [f"{metrics.generated_tokens:,} tokens generated, {metrics.avg_tokens_per_sec:.1f} a second"]
            return {
                "tags": metrics.memory_by_tag, "layers": layers, "budget": metrics.mem_budget_bytes, "facts": facts,
                "experts": experts_of(model).as_dict(),
            }  # fmt: skip

    # ---------------------------------------------------------------- text

    @overload
    def generate(  # type: ignore[overload-overlap] # a text is a sequence of texts, and the first one is meant
        self, prompts: str | Mapping[str, Any] | Sequence[int], *, n: int = 1, **request: Unpack[Generation]
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        **request: Unpack[Generation],
    ) -> list[Completion]: ...

    @rest_by_name
    def generate(self, prompts: Any, *, n: int = 1, **request: Unpack[Generation]) -> Any:
        """Texts that go on from prompts: one Completion for one prompt, a list in the same order for a list.

        A prompt is a text, in which names of special tokens count as those tokens, or a list of tokens. With `n` above
        1, each has n - 1 `alternatives`, for which the prompt is computed once; n is at most n_parallel. Other keywords
        are those of Generation: sampling, the end of a text, the form that it must have, log-probabilities.

        With a projector (`mmproj`) a prompt may be {"prompt": "... <__media__> ...", "images": [...]}, with that mark
        where each image belongs: a path, bytes, base64 or a PIL.Image. Sounds are "audio", both "multimodal_data".

        `logits_processor` is a function (input_ids, scores) -> scores, or a list of them, as transformers and
        llama-cpp-python have it: before each token is chosen it gets the tokens so far, int32 [n_tokens] (prompt and
        answer, without images), and the logits, float32 [n_vocab], and returns what the samplers, and `logprobs`, are
        to see of them; -inf bans a token. It runs in the engine's thread, so that all requests wait for it, and must
        not ask this engine for an answer. What it raises ends this request, and is raised here.

        Raises: PromptError, PromptTooLongError, RequestError, DecodeError; GrammarError for a form that cannot be held,
        and for an answer that was cut before it had it (of a `grammar`, finish_reason "length" is all that tells).
        """
        wanted = text.generate_calls(prompts, n, request, self._senses)
        return self._ask_all(wanted) if isinstance(wanted, list) else self._ask(wanted)

    @rest_by_name
    def stream(self, prompts: Prompt | Sequence[Prompt], **request: Unpack[Generation]) -> Iterator[Chunk]:
        """What generate() gives, as it comes; `index` says of which prompt. Chunks of a prompt's progress come first.
        Leaving the loop cancels the request."""
        return self._stream(text.stream_call(prompts, request, self._senses))

    @rest_by_name
    def infill(self, prefix: str, suffix: str, **request: Unpack[Generation]) -> Completion:
        """What stands between two texts, by a model that has tokens for that. Raises: ModelError if it has none."""
        return self._ask(text.infill_call(prefix, suffix, request))

    # ---------------------------------------------------------------- conversations

    @rest_by_name
    def chat(self, messages: Messages, **request: Unpack[Conversation]) -> ChatCompletion:
        """The answer in a conversation: messages of OpenAI's API, or one text of the user.

        Keywords are those of Conversation. `tools` are functions with types and a docstring, or schemas; what the model
        wants to call is in `.tool_calls`, each with `call()` and `result()`. With a projector (`mmproj`), parts of a
        message are images and sounds too; a path, bytes or a PIL.Image may stand where the API has a URL.

        Raises: what generate() does, TemplateError for tools that the model's template does not show.
        """
        self._check_tools(request)
        return self._ask(conversation.chat_call(messages, request, self._senses))

    @rest_by_name
    def chat_stream(self, messages: Messages, **request: Unpack[Conversation]) -> Iterator[Chunk]:
        """What chat() gives, as it comes; see stream(). Tool calls are in the last chunk."""
        self._check_tools(request)
        return self._stream(conversation.chat_stream(messages, request, self._senses))

    def _chat_events(self, messages: Messages, stream: bool, request: Mapping[str, Any]) -> Iterator[Any]:
        """The answer, or its chunks, as the dicts of OpenAI's API; `request` is what chat() takes."""
        self._check_tools(request)
        path, body, processors = conversation.chat_request(messages, stream, request, self._senses)
        if not stream:
            return iter([self._ask(Call(path, body, lambda answer: answer, processors=processors))])
        return _events(self._submit("POST", path, body, processors))

    @rest_by_name
    def apply_chat_template(self, messages: Messages, **request: Unpack[Conversation]) -> str:
        """The prompt that chat() makes of a conversation."""
        self._check_tools(request)
        return self._ask(conversation.template_call(messages, request, self._senses))

    # ---------------------------------------------------------------- the rest

    def embed(self, inputs: Any, *, dimensions: int | None = None, normalize: bool = True) -> Any:
        """A vector for a text or a list of tokens, a list of them for a list: lists of `facts.n_embd` numbers, scaled
        to length 1 unless `normalize` is False. With pooling="none", which most chat models have, a list of vectors for
        each text, one for each token; pooling="mean" or "last" makes one of them.

        `dimensions` keeps the first numbers of each, for models that were made for it. A text has at most n_ubatch
        tokens. Needs LLM(..., embedding=True).

        Raises: ModelError for an engine that was made without embedding, PromptError for what is empty, RequestError
        for `dimensions` that the model has not, PromptTooLongError for a text that is too long.
        """
        return self._ask(vectors.embed_call(inputs, dimensions, normalize))

    def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[Ranked]:
        """Documents by their relevance to a query, the best first; the best `top_n` of them. Needs LLM(...,
        reranking=True) and a model that is a reranker: the scores of another one mean nothing, and where the file
        does not say that it is one, a warning does.

        Raises: ModelError for an engine that was made without reranking, PromptError for documents that are no texts.
        """
        found = self._ask(vectors.rerank_call(query, documents, top_n))
        self._check_scores(found)
        return found

    def save_slot(self, filename: str, *, slot: int = 0) -> int:
        """Write what a slot has computed to a file in the folder that LLM(..., slot_save_path=) names; a request with
        `slot=` uses that slot. Returns how many tokens it holds.
        """
        return self._ask(calls.slot_call("save", slot, filename))

    def restore_slot(self, filename: str, *, slot: int = 0) -> int:
        """Read it again: a prompt that goes on from there computes only what is new. Returns how many tokens it has."""
        return self._ask(calls.slot_call("restore", slot, filename))

    def erase_slot(self, *, slot: int = 0) -> int:
        """Forget what a slot has computed. Returns how many tokens that were."""
        return self._ask(calls.slot_call("erase", slot, None))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The tokens of a text, as generate() computes them."""
        return self._ask(calls.tokenize_call(text, add_special, parse_special))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._ask(calls.detokenize_call(tokens))

    def pause(self) -> None:
        """Give the memory of weights and contexts back, of the host and of devices, when what runs has ended. The slots
        and their conversations wait on disk, in `spill_dir`; requests raise PausedError until resume()."""
        while not self._ask(calls.pause_call()):
            pass

    def resume(self) -> None:
        """Take it again: the model is loaded under its present budgets, and prompts that go on from the slots'
        conversations compute only what is new."""
        while not self._ask(calls.resume_call()):
            pass

    # ---------------------------------------------------------------- how calls are made

    def _ask(self, call: Call[T]) -> T:
        return self._ask_all([call])[0]

    def _ask_all(self, wanted: Sequence[Call[T]]) -> list[T]:
        """The answers, in order. Some more requests than there are slots wait in the engine, so that none is idle; one
        that is ended to make room for others begins again. An error cancels the others, and so does Ctrl-C."""
        found: dict[int, T] = {}
        waiting = collections.deque(range(len(wanted)))
        running: dict[int, Request] = {}
        open_spans: dict[int, Span] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self._n_slots:
                    i = waiting.popleft()
                    if wanted[i].path:
                        call = wanted[i]
                        if i not in open_spans and (span := self._span(call.path, call.body)):
                            open_spans[i] = span
                        running[i] = self._submit(call.method, call.path, call.body, call.processors)
                    else:
                        found[i] = wanted[i].read(None)
                timeout_ms = POLL_MS if len(running) == 1 else SWEEP_MS
                for i, request in list(running.items()):
                    answer = request.whole(timeout_ms)
                    timeout_ms = 0
                    if answer is None:
                        continue
                    running.pop(i).close()
                    if isinstance(answer, PreemptedError):
                        waiting.append(i)
                        time.sleep(0 if running else PREEMPTED_S)
                    else:
                        found[i] = wanted[i].read(answer)
                        if i in open_spans:
                            open_spans.pop(i).answered(found[i])
        except BaseException as e:
            for span in open_spans.values():
                span.failed(e)
            raise
        finally:
            for request in running.values():
                request.close()
        return [found[i] for i in range(len(wanted))]

    def _stream(self, stream: Stream) -> Iterator[Chunk]:
        span = self._span(stream.path, stream.body)
        try:
            running = self._submit("POST", stream.path, stream.body, stream.processors)
        except BaseException as e:
            if span:
                span.failed(e)
            raise
        return _chunks(running, stream.reader(), span)


def _events(running: Request) -> Iterator[Any]:
    with running as request:
        yield from request.events()


def _chunks(running: Request, read: Callable[[Any], Iterator[Chunk]], span: Span | None) -> Iterator[Chunk]:
    with running as request, ending(span):
        for event in request.events():
            for chunk in read(event):
                if span:
                    span.chunk(chunk)
                yield chunk
