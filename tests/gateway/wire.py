"""HTTP as it stands on the wire: for what a client library would hide."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self

ARRAY, LINES, EVENTS = "application/json", "application/x-ndjson", "text/event-stream"
"""The forms of a list of events."""

_PATIENCE = 30.0
_SMALL_BUFFER = 4_096


def request_bytes(
    path: str, *, method: str = "GET", version: str = "1.1", headers: Mapping[str, str] | None = None, body: bytes = b""
) -> bytes:
    """Return a request."""
    lines = [f"{method} {path} HTTP/{version}", "host: test"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def list_request(session_id: int, accept: str = ARRAY, version: str = "1.1") -> bytes:
    """Return the request for a session's events."""
    path = f"/api/collab/events?sessionId={session_id}"
    return request_bytes(path, version=version, headers={"accept": accept})


class WireError(Exception):
    """The connection has ended in the middle of an answer."""


class Answer:
    """An answer that is read piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, version: str, status: int, headers: Mapping[str, str]) -> None:
        self.version = version
        self.status = status
        self.headers = headers
        self._reader = reader

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader) -> Self:
        """Read up to the body."""
        async with asyncio.timeout(_PATIENCE):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        version, status, _ = first.split(" ", 2)
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return cls(reader, version, int(status), headers)

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes.

        Raises:
            WireError: It was cut off.
        """
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(await self._line(), 16):
                    yield await self._exactly(size)
                    assert await self._line() == b""
                assert await self._line() == b""
            elif "content-length" in self.headers:
                yield await self._exactly(int(self.headers["content-length"]))
            else:
                while part := await self._some():
                    yield part
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WireError("cut off") from error

    async def body(self) -> bytes:
        """Read the body to its end."""
        return b"".join([part async for part in self.parts()])

    async def _line(self) -> bytes:
        async with asyncio.timeout(_PATIENCE):
            return (await self._reader.readuntil(b"\r\n"))[:-2]

    async def _exactly(self, size: int) -> bytes:
        async with asyncio.timeout(_PATIENCE):
            return await self._reader.readexactly(size)

    async def _some(self) -> bytes:
        async with asyncio.timeout(_PATIENCE):
            return await self._reader.read(65_536)


class Connection:
    """A connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> Answer:
        """Send a request, and return its answer up to the body."""
        self.writer.write(request)
        return await Answer.read_head(self.reader)

    async def is_closed(self) -> bool:
        """Wait until the other side closes the connection without another word; False when it has something to say."""
        async with asyncio.timeout(_PATIENCE):
            return await self.reader.read(1) == b""

    def cut(self) -> None:
        """Leave without a word."""
        self.writer.transport.abort()


@asynccontextmanager
async def connected(address: str, *, small: bool = False) -> AsyncIterator[Connection]:
    """Connect.

    Args:
        address: The gateway's.
        small: Take little at a time, so that what is not read has to wait at the gateway.
    """
    host, _, port = address.rpartition(":")
    with socket.socket() as connection:
        connection.setblocking(False)
        if small:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        limit = _SMALL_BUFFER if small else 2**24
        reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
        try:
            yield Connection(reader, writer)
        finally:
            writer.transport.abort()
