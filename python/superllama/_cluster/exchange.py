"""A request to the engine of a group, and its answer: bytes that pass as they come, no faster and no slower."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

PIECE = 1 << 16
OF_THE_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a client asks for. `session` says whose conversation it belongs to, "" where nobody knows."""

    method: str
    target: str  # path and query
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    session: str = ""


@dataclasses.dataclass(frozen=True)
class Head:
    """How an answer begins. Names of headers are in lower case; those of the connection are left out."""

    status: int
    headers: Mapping[str, str]


class Exchange:
    """`async with Exchange(host, port, call) as exchange`: then there is `head`, and pieces() follow. Leaving it ends
    the connection, by which the engine knows that nobody listens any more.

    Raises: OSError where the engine cannot be reached, or ends in the middle.
    """

    head: Head

    def __init__(self, host: str, port: int, call: Call) -> None:
        self._host, self._port, self._call = host, port, call
        self._rest: int | None = None  # bytes of a body whose length is known
        self._chunked = False

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        try:
            self._writer.write(_request(self._host, self._port, self._call))
            await self._writer.drain()
            await self._read_head()
        except BaseException:
            self._writer.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the engine's answer ends in the middle")
        return line.rstrip(b"\r\n")

    async def _read_head(self) -> None:
        status = int((await self._line()).split(b" ", 2)[1])
        found: dict[str, str] = {}
        while line := await self._line():
            name, _, value = line.partition(b":")
            found[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        self._chunked = found.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in found:
            self._rest = int(found["content-length"])
        self.head = Head(status, {name: value for name, value in found.items() if name not in OF_THE_CONNECTION})

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes: of a stream each event when it is there."""
        if self._chunked:
            while size := int((await self._line()).split(b";")[0], 16):
                yield await self._exactly(size)
                await self._line()
            return
        while self._rest is None or self._rest > 0:
            piece = await self._reader.read(PIECE if self._rest is None else min(PIECE, self._rest))
            if not piece and self._rest is None:
                return  # a body without a length ends with its connection
            if not piece:
                raise ConnectionError("the engine's answer ends in the middle")
            self._rest = None if self._rest is None else self._rest - len(piece)
            yield piece

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as e:
            raise ConnectionError("the engine's answer ends in the middle") from e


def _request(host: str, port: int, call: Call) -> bytes:
    headers = {name: value for name, value in call.headers.items() if name.lower() not in OF_THE_CONNECTION}
    headers |= {"Host": f"{host}:{port}", "Connection": "close", "Content-Length": str(len(call.body))}
    lines = [f"{call.method} {call.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a request's headers have no line ends")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + call.body
