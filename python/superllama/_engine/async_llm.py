"""AsyncLLM: the same engine for asyncio. Where LLM waits, a thread of its own waits here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .._errors import PreemptedError
from .._progress import ProgressCallback
from . import calls, conversation, text, vectors
from .base import Base
from .calls import Call, Prompt, Stream
from .handle import Request
from .llm import PREEMPTED_S, Messages
from .names import rest_by_name
from .results import ChatCompletion, Chunk, Completion, Ranked
from .spans import ending

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .fields import Conversation, Generation
    from .options import EngineOptions

T = TypeVar("T")

MOST_WAITING = 1024  # requests that are waited for at once; a thread is made where none is idle
WAIT_MS = 1000  # a thread looks that often whether its task still wants it


class AsyncLLM(Base):
    """LLM for asyncio: the same parameters, and methods that are awaited. Cancelling a task cancels its request.

    It is made like LLM, which takes as long as the model takes to load; `await AsyncLLM.load(...)` leaves the loop to
    others meanwhile.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        progress: ProgressCallback | bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(MOST_WAITING, "superllama-wait")
        super().__init__(model, progress, dict(options))

    @classmethod
    async def load(
        cls,
        model: str | os.PathLike[str],
        *,
        progress: ProgressCallback | bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Make one in a thread."""
        return await asyncio.to_thread(lambda: cls(model, progress=progress, **options))

    def close(self) -> None:
        """Cancel what runs, and free the model. Closing twice is fine."""
        super().close()
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # ---------------------------------------------------------------- text

    @overload
    async def generate(  # type: ignore[overload-overlap] # a text is a sequence of texts, and the first one is meant
        self, prompts: str | Mapping[str, Any] | Sequence[int], *, n: int = 1, **request: Unpack[Generation]
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        **request: Unpack[Generation],
    ) -> list[Completion]: ...

    @rest_by_name
    async def generate(self, prompts: Any, *, n: int = 1, **request: Unpack[Generation]) -> Any:
        """See LLM.generate()."""
        wanted = text.generate_calls(prompts, n, request, self._senses)
        return await self._ask_all(wanted) if isinstance(wanted, list) else await self._ask(wanted)

    @rest_by_name
    def stream(self, prompts: Prompt | Sequence[Prompt], **request: Unpack[Generation]) -> AsyncIterator[Chunk]:
        """See LLM.stream()."""
        return self._stream(text.stream_call(prompts, request, self._senses))

    @rest_by_name
    async def infill(self, prefix: str, suffix: str, **request: Unpack[Generation]) -> Completion:
        """See LLM.infill()."""
        return await self._ask(text.infill_call(prefix, suffix, request))

    # ---------------------------------------------------------------- conversations

    @rest_by_name
    async def chat(self, messages: Messages, **request: Unpack[Conversation]) -> ChatCompletion:
        """See LLM.chat()."""
        self._check_tools(request)
        return await self._ask(conversation.chat_call(messages, request, self._senses))

    @rest_by_name
    def chat_stream(self, messages: Messages, **request: Unpack[Conversation]) -> AsyncIterator[Chunk]:
        """See LLM.chat_stream()."""
        self._check_tools(request)
        return self._stream(conversation.chat_stream(messages, request, self._senses))

    @rest_by_name
    async def apply_chat_template(self, messages: Messages, **request: Unpack[Conversation]) -> str:
        """See LLM.apply_chat_template()."""
        self._check_tools(request)
        return await self._ask(conversation.template_call(messages, request, self._senses))

    # ---------------------------------------------------------------- the rest

    async def embed(self, inputs: Any, *, dimensions: int | None = None, normalize: bool = True) -> Any:
        """See LLM.embed()."""
        return await self._ask(vectors.embed_call(inputs, dimensions, normalize))

    async def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[Ranked]:
        """See LLM.rerank()."""
        found = await self._ask(vectors.rerank_call(query, documents, top_n))
        self._check_scores(found)
        return found

    async def save_slot(self, filename: str, *, slot: int = 0) -> int:
        """See LLM.save_slot()."""
        return await self._ask(calls.slot_call("save", slot, filename))

    async def restore_slot(self, filename: str, *, slot: int = 0) -> int:
        """See LLM.restore_slot()."""
        return await self._ask(calls.slot_call("restore", slot, filename))

    async def erase_slot(self, *, slot: int = 0) -> int:
        """See LLM.erase_slot()."""
        return await self._ask(calls.slot_call("erase", slot, None))

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """See LLM.tokenize()."""
        return await self._ask(calls.tokenize_call(text, add_special, parse_special))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """See LLM.detokenize()."""
        return await self._ask(calls.detokenize_call(tokens))

    async def pause(self) -> None:
        """See LLM.pause()."""
        while not await self._ask(calls.pause_call()):
            pass

    async def resume(self) -> None:
        """See LLM.resume()."""
        while not await self._ask(calls.resume_call()):
            pass

    # ---------------------------------------------------------------- how calls are made

    async def _ask(self, call: Call[T]) -> T:
        if not call.path:
            return call.read(None)
        span = self._span(call.path, call.body)
        try:
            found = await self._answer(call)
        except BaseException as e:
            if span:
                span.failed(e)
            raise
        if span:
            span.answered(found)
        return found

    async def _answer(self, call: Call[T]) -> T:
        while True:
            request = self._submit(call.method, call.path, call.body, call.processors)
            try:
                data = b"".join([piece async for piece in self._pieces(request)])
                return call.read(request.answer_of(data))
            except PreemptedError:
                await asyncio.sleep(PREEMPTED_S)
            finally:
                await self._ended(request)

    async def _ask_all(self, wanted: Sequence[Call[T]]) -> list[T]:
        """The answers, in order; see LLM._ask_all()."""
        room = asyncio.Semaphore(2 * self._n_slots)

        async def one(call: Call[T]) -> T:
            async with room:
                return await self._ask(call)

        tasks = [asyncio.ensure_future(one(call)) for call in wanted]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(self, stream: Stream) -> AsyncIterator[Chunk]:
        read = stream.reader()
        span = self._span(stream.path, stream.body)
        with ending(span):
            request = self._submit("POST", stream.path, stream.body, stream.processors)
            try:
                async for piece in self._pieces(request):
                    for event in request.events_of(piece):
                        for chunk in read(event):
                            if span:
                                span.chunk(chunk)
                            yield chunk
            finally:
                await self._ended(request)

    async def _pieces(self, request: Request) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._threads, request.poll, WAIT_MS)) != b"":
            if piece is not None:
                yield piece

    async def _ended(self, request: Request) -> None:
        request.cancel()
        if self.closed:  # and its threads with it
            request.close()
            return
        # its last reader may still wait in a thread
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, request.close))
