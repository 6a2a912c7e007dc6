"""A group over time: an engine whose layers are also with parts on other nodes, which go away and come back.

What happens when a part is lost: its connection ends at the relay, requests that run fail with an error that says so,
new ones wait. The engine learns that the part is gone, by which the layers come back to the host, frees its context,
and makes a new one, with an empty stand-in on its own node behind the address of the part. Then it serves, degraded.
When the part is back, on whatever node, the same happens without a failure: what runs ends, conversations go to disk
and come back, and so do the layers. The engine's process stays, and so do the other parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from .._errors import Error
from .bundles import Bundle, engine_options, vram_budgets
from .engine import HOST, Engine
from .exchange import Call, Exchange, Head
from .part import RpcServer
from .relay import Relay, address

SOON_S = 2.0  # that a lost part has to be back, before the group goes on without it
REACH_S = 2.0  # for a connection to a part
LOOK_S = 2.0  # between two looks at a part that is away
PATIENCE_S = 30.0  # that a part which is back waits for a moment without requests, before new ones have to wait for it
WAIT_S = 120.0  # that a request waits for a group to be whole again
RETRY_S = 1.0
# what the engine says of a device that it has lost; where that is, and what a context is, a client does not know
GONE = re.compile(rb"the RPC server at [^ ]+ is gone, and what this context had there[^\"\\]*")
PAUSED = b"the server is paused"  # a request that was on its way when the group began to reload

logger = logging.getLogger("superllama.cluster")


class Parts(Protocol):
    """What starts the parts of a group, and sees them end. Parts count from 0."""

    async def start(self, i: int) -> str:
        """The endpoint of part i, started anew where it was started before; waits until there is a node for it."""

    async def ended(self, i: int) -> str:
        """Waits until part i, as it was started last, is no more; why."""

    async def close(self) -> None:
        """End all of them."""


@dataclasses.dataclass
class _Part:
    relay: Relay
    endpoint: str | None  # where it is; None while it is lost
    broken: bool = False  # what the engine had there is gone
    stand_in: RpcServer | None = None  # behind the relay, while the part is away
    why: str = ""  # it is away
    restarts: int = 0

    @property
    def state(self) -> str:
        return "here" if self.stand_in is None and not self.broken else "away"


class Group:
    """One replica. start() makes it; then answer() asks it, facts() looks at it."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        model: str,
        secret: str,
        parts: Parts,
        options: Mapping[str, Any],
        words: Sequence[str] = (),
    ) -> None:
        self._bundles, self._model, self._secret = bundles, model, secret
        self._driver, self._options, self._words = parts, options, words
        self._parts: list[_Part] = []
        self._engine: Engine | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()  # something changed
        self._open = asyncio.Event()  # requests may go to the engine
        self._idle = asyncio.Event()  # none is there
        self._idle.set()
        self._running = 0
        self._answered = 0
        self._reloads = 0
        self._lost_last = ""
        self._refusal = ""  # of the engine, to load its model with what parts there are

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Start the parts, then the engine. Raises: Error with the reason where one of them does not."""
        loop = asyncio.get_running_loop()
        n = len(self._bundles) - 1
        try:
            endpoints = await asyncio.gather(*(self._driver.start(i) for i in range(n)))
            for i, endpoint in enumerate(endpoints):
                relay = Relay(functools.partial(self._from_thread, loop, i))
                relay.point_to(endpoint)
                self._parts.append(_Part(relay, endpoint))
            self._engine = await asyncio.to_thread(self._new_engine)
        except BaseException:
            await self.close()
            raise
        self._tasks = [asyncio.create_task(self._keep(i)) for i in range(n)]
        self._tasks.append(asyncio.create_task(self._settle_forever()))
        self._open.set()

    async def close(self) -> None:
        """End all of it. Twice is fine."""
        self._open.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.to_thread(self.close_here)
        await self._driver.close()

    def close_here(self) -> None:
        """End what runs on this node: for who has no loop any more."""
        if self._engine is not None:
            self._engine.close()
        for part in self._parts:
            part.relay.close()
            if part.stand_in is not None:
                part.stand_in.close()

    def check(self) -> None:
        """Raises: Error where the group cannot be used any more, and has to be made again."""
        if self._engine is None:
            raise Error("the group has not started")
        if (why := self._engine.failure) is not None:
            raise Error(why)
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise Error(f"nobody looks after the group any more: {error!r}")

    def facts(self) -> dict[str, Any]:
        """What it is doing. `state`: loading, ready, degraded (it serves, and some layers are not where they should
        be), recovering (requests wait)."""
        away = any(part.state == "away" for part in self._parts)
        state = "loading" if self._engine is None else "degraded" if away else "ready"
        if self._engine is not None and not self._open.is_set():
            state = "recovering"
        parts = [
            {
                "bundle": i + 1,
                "state": part.state,
                "endpoint": part.endpoint,
                "memory_bytes": self._bundles[i + 1].memory,
                "restarts": part.restarts,
                **({"reason": part.why} if part.state == "away" else {}),
            }
            for i, part in enumerate(self._parts)
        ]
        counts = {"requests": self._running, "answered": self._answered, "reloads": self._reloads}
        return {"state": state, **counts, "parts": parts}

    async def status(self) -> dict[str, Any]:
        """facts(), and what the engine says of its memory and its layers."""
        assert self._engine is not None
        return {**self.facts(), "engine": await asyncio.to_thread(self._engine.status), "pid": self._engine.process.pid}

    # ---------------------------------------------------------------- requests

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """The head of the engine's answer, then its body as it comes. A request of which nothing was answered when a
        part was lost is asked once more, when the group serves again."""
        for attempt in range(2):
            if not await self._opened():
                why = f"the model's group cannot answer now: {self._why_not()}"
                for part in error_answer(503, why):
                    yield part
                return
            reloads = self._reloads
            assert self._engine is not None
            with self._counted():
                try:
                    async with Exchange(HOST, self._engine.port, self._with_key(call, self._engine.key)) as exchange:
                        first = b""
                        if exchange.head.status >= 500:
                            first = b"".join([piece async for piece in exchange.pieces()])
                        if attempt > 0 or not (GONE.search(first) or PAUSED in first):
                            yield exchange.head
                            if first:
                                yield self._explained(first)
                            async for piece in exchange.pieces():
                                yield self._explained(piece)
                            return
                except OSError as e:
                    why = self._engine.failure or f"the engine does not answer: {e}"
                    raise Error(f"the model's group failed: {why}") from e
            await self._after_reload(reloads)

    @staticmethod
    def _with_key(call: Call, key: str) -> Call:
        headers = {name: value for name, value in call.headers.items() if name.lower() != "authorization"}
        return dataclasses.replace(call, headers={**headers, "Authorization": f"Bearer {key}"})

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._answered += 1
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def _opened(self) -> bool:
        """Wait until the engine takes requests; False where that is not to be expected."""
        end = time.monotonic() + WAIT_S
        while not self._open.is_set() and not self._refusal and time.monotonic() < end:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._open.wait(), RETRY_S)
        return self._open.is_set()

    async def _after_reload(self, reloads: int) -> None:
        """Wait for the end of what follows a loss, if something does."""
        end = time.monotonic() + WAIT_S
        while self._reloads == reloads and not self._refusal and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def _why_not(self) -> str:
        away = "; ".join(f"part {i + 1} is away: {part.why}" for i, part in enumerate(self._parts) if part.why)
        without = f"; without it the engine cannot load the model: {self._refusal}" if self._refusal else ""
        return (away or f"it does not serve after {WAIT_S:.0f} s") + without

    def _explained(self, piece: bytes) -> bytes:
        """A piece of an answer, where its error says in the client's words that a node was lost."""
        if b"is gone, and what" not in piece:
            return piece
        lost = "; ".join(f"part {i + 1}: {part.why}" for i, part in enumerate(self._parts) if part.why)
        text = (
            f"a node of this model's group went away while it answered ({lost or self._lost_last or 'just now'}); the "
            "layers that were there come back to the others: send the request again"
        )
        return GONE.sub(lambda _: json.dumps(text)[1:-1].encode(), piece)

    # ---------------------------------------------------------------- parts that go and come

    def _from_thread(self, loop: asyncio.AbstractEventLoop, i: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the group with it
            loop.call_soon_threadsafe(self._on_broken, i, "its connection ended")

    def _on_broken(self, i: int, why: str) -> None:
        part = self._parts[i]
        if part.stand_in is not None and part.relay.target == part.stand_in.endpoint:
            part.stand_in = None  # its process ended; another one will stand in
        part.broken = True
        part.why = part.why or why
        self._lost_last = f"part {i + 1}: {part.why}"
        part.relay.point_to(None)
        self._open.clear()
        logger.warning("part %d (%s) of the group is lost: %s", i + 1, part.endpoint, part.why)
        self._wake.set()

    async def _keep(self, i: int) -> None:
        """Have a part there, again and again."""
        part = self._parts[i]
        while True:
            why = await self._driver.ended(i)
            in_use = part.endpoint is not None and part.relay.target == part.endpoint
            part.endpoint, part.why = None, why
            if in_use:
                self._on_broken(i, why)
            while part.endpoint is None:
                try:
                    part.endpoint = await self._driver.start(i)
                except Exception as e:  # whatever it is, it is tried again
                    part.why = f"it cannot start again: {str(e).splitlines()[0]}"
                    logger.warning("part %d of the group: %s", i + 1, e)
                    await asyncio.sleep(RETRY_S)
            part.restarts += 1
            self._wake.set()

    async def _settle_forever(self) -> None:
        while True:
            timeout = LOOK_S if any(part.stand_in is not None for part in self._parts) else None
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout)
            self._wake.clear()
            while any(part.broken for part in self._parts):
                self._open.clear()
                await self._soon()
                await self._try_reload(await self._present())
            if any(part.stand_in is not None and part.endpoint is not None for part in self._parts):
                await self._take_back()
            if not any(part.broken for part in self._parts):
                self._open.set()

    async def _soon(self) -> None:
        """Wait for lost parts to be back, for a moment."""
        end = time.monotonic() + SOON_S
        while time.monotonic() < end and not all(await self._present()):
            await asyncio.sleep(0.05)

    async def _present(self) -> list[bool]:
        """Which parts are there. Who is in use is; others are asked for a connection."""
        return list(await asyncio.gather(*map(self._is_there, self._parts)))

    @staticmethod
    async def _is_there(part: _Part) -> bool:
        return part.state == "here" or await _reachable(part.endpoint)

    async def _take_back(self) -> None:
        """Have the layers at a part that is back, when nothing runs."""
        present = await self._present()
        if not any(here and part.stand_in is not None for part, here in zip(self._parts, present, strict=True)):
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), PATIENCE_S)
        if any(part.broken for part in self._parts):
            self._wake.set()
            return
        self._open.clear()
        await self._try_reload(await self._present())

    async def _try_reload(self, present: Sequence[bool]) -> None:
        try:
            await self._reload(present)
        except Error as e:
            logger.error("the group goes on trying: %s", e)
            for part in self._parts:
                part.broken = part.broken or part.stand_in is None
            await asyncio.sleep(RETRY_S)
            self.check()  # an engine that has ended is no use; who made the group makes it again

    async def _reload(self, present: Sequence[bool]) -> None:
        """Make the engine's context anew, with the parts that are there. Raises: Error."""
        engine = self._engine
        assert engine is not None
        began = time.monotonic()
        was_broken = [part.broken for part in self._parts]
        if any(was_broken):
            await self._tell(engine)
            stays = [here and not broken for here, broken in zip(present, was_broken, strict=True)]
        else:
            stays = [part.stand_in is None for part in self._parts]
        for part in self._parts:
            part.broken = False
        with contextlib.suppress(Error):  # where layers cannot leave now, they do when the context is gone
            await asyncio.to_thread(engine.set_vram, vram_budgets(self._bundles, stays))
        while await asyncio.to_thread(engine.pause) != "paused":
            self.check()
        await self._point_relays(present)
        await self._resume(engine)
        budgets = vram_budgets(self._bundles, [part.stand_in is None for part in self._parts])
        assert self._engine is not None
        await asyncio.to_thread(self._engine.set_vram, budgets)
        self._reloads += 1
        logger.warning(
            "the group serves again after %.1f s: %s",
            time.monotonic() - began,
            ", ".join(f"part {i + 1} is {part.state}" for i, part in enumerate(self._parts)),
        )

    async def _resume(self, engine: Engine) -> None:
        """Have the model loaded again; by another engine, where this one cannot do it without a part that is away."""
        while True:
            state, refusal = await asyncio.to_thread(engine.resume)
            self.check()
            if state == "ready":
                break
            if any(part.broken for part in self._parts):  # another one was lost meanwhile
                present = await self._present()
                for part in self._parts:
                    part.broken = False
                await self._point_relays(present)
            elif refusal:
                self._refusal = refusal
                logger.warning("the engine cannot load its model without the parts that are away: %s", refusal)
                await self._begin_anew(engine)
                break
            await asyncio.sleep(0.05)

    async def _begin_anew(self, engine: Engine) -> None:
        """Wait for a part that is away, and start another engine then. One that goes on trying hears no new budgets."""
        while not any(await asyncio.gather(*(_reachable(part.endpoint) for part in self._parts if part.stand_in))):
            await asyncio.sleep(RETRY_S)
        present = await self._present()
        await asyncio.to_thread(engine.close)
        for part in self._parts:
            part.broken = False
        await self._point_relays(present)
        self._engine = await asyncio.to_thread(self._new_engine)
        self._refusal = ""

    def _new_engine(self) -> Engine:
        here = [part.stand_in is None for part in self._parts]
        options = engine_options(self._bundles, self._options, here)
        relays = [part.relay.endpoint for part in self._parts]
        return Engine(self._model, relays, self._secret, options, self._words)

    async def _tell(self, engine: Engine) -> None:
        """Let the engine notice that a device is gone, also where nobody asks it anything."""
        for _ in range(3):
            said = await asyncio.to_thread(engine.try_one_token)
            if GONE.search(said.encode()):
                return

    async def _point_relays(self, present: Sequence[bool]) -> None:
        for part, here in zip(self._parts, present, strict=True):
            if here and part.endpoint is not None:
                part.relay.point_to(part.endpoint)
                stand_in, part.stand_in, part.why = part.stand_in, None, ""
                if stand_in is not None:
                    await asyncio.to_thread(stand_in.close)
            elif part.stand_in is None:
                part.stand_in = await asyncio.to_thread(RpcServer, HOST, 1, self._secret)
                part.relay.point_to(part.stand_in.endpoint)


def error_answer(status: int, text: str) -> tuple[Head, bytes]:
    """An answer in the words of OpenAI's API."""
    body = {"error": {"message": text, "type": "unavailable_error", "code": status}}
    return Head(status, {"content-type": "application/json"}), json.dumps(body).encode()


async def _reachable(endpoint: str | None) -> bool:
    if endpoint is None:
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(*address(endpoint)), REACH_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
