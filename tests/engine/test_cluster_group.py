"""A group of nodes without Ray: parts are processes of this machine, which are killed, and come back or stay away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rpc_devices import rpc_server
from serving import http_server

from superllama import Error
from superllama._cluster.bundles import read_bundles
from superllama._cluster.exchange import Call, Head
from superllama._cluster.group import Group
from superllama._cluster.part import RpcServer

T = TypeVar("T")
SECRET = "a secret of one test alone"
NODE = {"CPU": 1, "memory": "90MiB"}  # the model has 93.8
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_parallel": 2, "flags": {"no_warmup": True, "repack": False}}
PROMPT = "The capital of France is Paris. The capital of Italy is"


pytestmark = pytest.mark.usefixtures("no_gpu")


class LocalParts:
    """Parts on this machine. While `allowed` is not set, none starts: there is no node for it."""

    def __init__(self) -> None:
        self.servers: dict[int, RpcServer] = {}
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.starts = 0

    async def start(self, i: int) -> str:
        await self.allowed.wait()
        if i in self.servers:
            await asyncio.to_thread(self.servers[i].close)
        self.servers[i] = await asyncio.to_thread(RpcServer, "127.0.0.1", 1, SECRET)
        self.starts += 1
        return self.servers[i].endpoint

    async def ended(self, i: int) -> str:
        while (why := await asyncio.to_thread(self.servers[i].wait, 0.1)) is None:
            pass
        return why

    async def close(self) -> None:
        for server in self.servers.values():
            server.close()

    def kill(self, i: int) -> None:
        os.kill(self.servers[i].pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def running_group(model: Path, n_parts: int = 1, **options: Any) -> AsyncIterator[tuple[Group, LocalParts]]:
    parts = LocalParts()
    group = Group(read_bundles([NODE] * (n_parts + 1)), str(model), SECRET, parts, OPTIONS | options)
    await group.start()
    try:
        yield group, parts
    finally:
        await group.close()


def call(stream: bool = False, n: int = 16, **body: Any) -> Call:
    asked = {"prompt": PROMPT, "temperature": 0, "n_predict": n, "stream": stream, "return_tokens": True, **body}
    return Call("POST", "/completion", {"content-type": "application/json"}, json.dumps(asked).encode())


async def whole(group: Group, request: Call) -> tuple[int, Any]:
    head: Head | None = None
    body = b""
    async for piece in group.answer(request):
        if isinstance(piece, Head):
            head = piece
        else:
            body += piece
    assert head is not None
    return head.status, json.loads(body)


async def tokens(group: Group, n: int = 16) -> list[int]:
    status, answer = await whole(group, call(n=n))
    assert status == 200, answer
    return list(answer["tokens"])


async def until(there: Callable[[], Awaitable[T]]) -> T:
    """What it gives, once that is something; as long as a busy machine may take."""
    for _ in range(3000):
        if found := await there():
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


async def devices(group: Group) -> list[str]:
    """Where the layers are that are not on the host."""
    return [layer["device"] for layer in (await group.status())["engine"]["layers"] if layer["tier"] == "device"]


def state_is(group: Group, state: str) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        return group.facts()["state"] == state

    return there


def test_a_model_that_no_node_has_memory_for(demo_model: Path, tmp_path: Path) -> None:
    """Tokens are those of one process with the same placement; layers are with the part."""
    assert demo_model.stat().st_size > 90 << 20

    async def grouped() -> tuple[list[int], list[str]]:
        async with running_group(demo_model) as (group, _):
            return await tokens(group), await devices(group)

    found, where = asyncio.run(grouped())
    assert where
    budgets = ["--mem-budget", "90MiB", "--vram-budget", "90MiB"]
    flags = ["-c", 512, "-np", 2, "--kv-unified", "--async-prefetch", "--no-repack", *budgets]
    with (
        rpc_server() as server,
        http_server(demo_model, tmp_path / "log", "--rpc", server.endpoint, *flags) as single,
    ):
        answer = single.complete(PROMPT, n_predict=16, return_tokens=True)
        layers = single.request("/superllama")[1]["layers"]
    assert [layer["device"] for layer in layers if layer["tier"] == "device"] == where
    assert found == answer["tokens"]


def test_a_part_that_is_killed_and_starts_again(demo_model: Path) -> None:
    """A stream ends with an error that says so; the next request works; the engine's process stays."""

    async def run() -> None:
        async with running_group(demo_model) as (group, parts):
            reference = await tokens(group)
            before = await group.status()
            assert await devices(group)
            said = b""
            async for piece in group.answer(call(stream=True, n=400, ignore_eos=True)):
                if isinstance(piece, Head):
                    assert piece.status == 200
                    continue
                said += piece
                if said.count(b"data: ") == 4:
                    parts.kill(0)
            error = said.rpartition(b'"error"')[2].decode()
            assert "a node of this model's group went away while it answered" in error
            assert "its RPC server ended by signal 9" in error or "its connection ended" in error
            assert await tokens(group) == reference
            await until(state_is(group, "ready"))
            after = await group.status()
            assert after["pid"] == before["pid"]
            assert after["parts"][0]["restarts"] == 1
            assert await devices(group)

    asyncio.run(run())


def test_a_part_that_stays_away_and_comes_back(demo_model: Path) -> None:
    """The group serves without it, with the layers on the host; when there is a node, they return, on any port."""

    async def run() -> None:
        async with running_group(demo_model) as (group, parts):
            reference = await tokens(group)
            there = await devices(group)
            before = await group.status()
            parts.allowed.clear()
            parts.kill(0)
            await until(state_is(group, "degraded"))
            assert group.facts()["parts"][0]["state"] == "away"
            assert group.facts()["parts"][0]["reason"] == "its RPC server ended by signal 9"
            assert await devices(group) == []
            assert await tokens(group) == reference
            parts.allowed.set()
            await until(state_is(group, "ready"))
            assert await tokens(group) == reference  # and layers move before the first of them

            async def back() -> bool:
                return await devices(group) == there

            await until(back)
            after = await group.status()
            assert after["pid"] == before["pid"]
            assert (after["parts"][0]["state"], after["parts"][0]["restarts"]) == ("here", 1)

    asyncio.run(run())


def test_requests_without_an_answer_yet_are_asked_again(demo_model: Path) -> None:
    """Of a request that does not stream, nobody notices that a part was lost; other parts stay where they are."""

    async def run() -> None:
        async with running_group(demo_model, 2) as (group, parts):
            reference = await tokens(group, 200)
            other = parts.servers[0].pid
            asked = asyncio.create_task(tokens(group, 200))

            async def computes() -> bool:
                return bool((await group.status())["engine"]["requests_in_flight"])

            await until(computes)
            parts.kill(1)
            assert await asked == reference
            await until(state_is(group, "ready"))
            assert parts.servers[0].pid == other
            assert parts.servers[0].wait(0) is None
            assert [part["restarts"] for part in group.facts()["parts"]] == [0, 1]

    asyncio.run(run())


def test_a_host_that_cannot_do_without_the_part(demo_model: Path) -> None:
    """Where its budget does not hold all of the KV cache: requests are told so, until the part is back."""

    async def run() -> None:
        async with running_group(demo_model, n_ctx=1024) as (group, parts):
            reference = await tokens(group)
            parts.allowed.clear()
            parts.kill(0)

            async def refused() -> str:
                status, answer = await whole(group, call())
                return str(answer["error"]["message"]) if status == 503 else ""

            said = await until(refused)
            assert "part 1 is away: its RPC server ended by signal 9" in said
            assert "cannot load the model: " in said and "90 MiB are too few" in said
            assert group.facts()["state"] == "recovering"
            parts.allowed.set()
            assert await until(lambda: answered(group)) == reference
            assert group.facts()["state"] == "ready"
            assert await devices(group)

    async def answered(group: Group) -> list[int]:
        status, answer = await whole(group, call())
        return list(answer["tokens"]) if status == 200 else []

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_request(demo_model: Path) -> None:
    async def run() -> None:
        async with running_group(demo_model, 0) as (group, _):
            stream = group.answer(call(stream=True, n=-1, ignore_eos=True))
            async for piece in stream:
                if isinstance(piece, bytes):
                    break
            await stream.aclose()  # type: ignore[attr-defined]

            async def free() -> bool:
                return not (await group.status())["engine"]["requests_in_flight"]

            await until(free)
            assert group.facts()["requests"] == 0

    asyncio.run(run())


def test_a_group_that_cannot_start_says_why(tmp_path: Path, tiny_model: Path) -> None:
    async def start(model: Path, options: dict[str, Any]) -> None:
        parts = LocalParts()
        group = Group(read_bundles([NODE, NODE]), str(model), SECRET, parts, options)
        with pytest.raises(Error) as failed:
            await group.start()
        assert all(server.wait(0) is not None for server in parts.servers.values())
        with pytest.raises(Error, match="has not started"):
            group.check()
        raise failed.value

    with pytest.raises(Error, match=r"none\.gguf"):
        asyncio.run(start(tmp_path / "none.gguf", {}))
    with pytest.raises(Error, match="does not start"):
        asyncio.run(start(tiny_model, {"n_ctx": 1 << 20}))


def test_an_engine_that_ended_is_told(tiny_model: Path) -> None:
    async def run() -> None:
        async with running_group(tiny_model, 0) as (group, _):
            group.check()
            os.kill((await group.status())["pid"], signal.SIGKILL)

            async def ended() -> bool:
                with contextlib.suppress(Error):
                    group.check()
                    return False
                return True

            await until(ended)
            with pytest.raises(Error, match="the engine ended"):
                await whole(group, call())

    asyncio.run(run())
