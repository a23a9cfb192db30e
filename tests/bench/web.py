"""Load on the JSON gateway, with a small HTTP/1.1 client that costs little; bounded in count and time."""

import asyncio
import re
import statistics
import time
from collections.abc import AsyncIterator
from typing import cast

import uvloop

from tests.bench.live import Delays, at_rate
from tests.bench.load import PAYLOAD

CONNECTIONS = 64
_PATH = "/api/collab/events"
_WARM_UP = 200
"""Events that are not counted."""
_PATIENCE = 60.0


_CREATED = re.compile(rb"HTTP/1.1 201 .*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n", re.IGNORECASE | re.DOTALL)
"""The head of an answer to an append that is stored."""


class _Connection:
    """A connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: str) -> "_Connection":
        """Connect."""
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=2**24))

    async def post(self, body: bytes) -> None:
        """Append an event; raise `RuntimeError` when it is not stored."""
        self._writer.write(_request(body))
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _CREATED.match(head)
        if length is None:
            raise RuntimeError(f"the gateway answered {head!r}")
        await self._reader.readexactly(int(length[1]))

    async def get(self, query: str, accept: str) -> AsyncIterator[bytes]:
        """Yield the chunks of an answer."""
        self._writer.write(f"GET {_PATH}?{query} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the gateway answered {head!r}")
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)

    def close(self) -> None:
        """Close."""
        self._writer.close()


class _RepeatedPost(asyncio.Protocol):
    """A connection on which an event is appended again and again, until it is not stored."""

    def __init__(self, body: bytes) -> None:
        self.answers = 0
        self.closed = asyncio.get_running_loop().create_future()
        self._request = _request(body)
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Send the next request when the answer is complete."""
        self._unread += data
        head = _CREATED.match(self._unread)
        if head is None or len(self._unread) < head.end() + int(head[1]):
            if b"\r\n\r\n" in self._unread and head is None:
                self._transport.abort()
            return
        self._unread = b""
        self.answers += 1
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        if not self.closed.done():
            self.closed.set_result(None)


def append_rate(address: str, session: int, seconds: int) -> float:
    """Return the appends per second over 64 connections, each of which waits for its answer."""
    return uvloop.run(_append(address, _body(session, 7), seconds))


def listing_rate(address: str, session: int, expected: int) -> float:
    """Return the events per second of a list in lines of JSON, which has to have so many."""
    return uvloop.run(_list(address, session, expected))


def delivery(address: str, session: int, *, rate: int, seconds: int) -> Delays:
    """Return the delay from the POST of an event to its arrival as a server-sent event, one writer, one follower."""
    return uvloop.run(_delivery(address, session, rate, _WARM_UP + rate * seconds))


async def _append(address: str, body: bytes, seconds: int) -> float:
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    posts = [
        (await loop.create_connection(lambda: _RepeatedPost(body), host, int(port)))[1] for _ in range(CONNECTIONS)
    ]
    await asyncio.wait([post.closed for post in posts], timeout=seconds)
    count, took = sum(post.answers for post in posts), time.perf_counter() - started
    if any(post.closed.done() for post in posts):
        raise RuntimeError("the gateway has not stored all of it")
    return count / took


async def _list(address: str, session: int, expected: int) -> float:
    connection = await _Connection.open(address)
    count, started = 0, time.perf_counter()
    async for chunk in connection.get(f"sessionId={session}", "application/x-ndjson"):
        count += chunk.count(b"\n")
    if count != expected:
        raise RuntimeError(f"{count} events came, not {expected}")
    connection.close()
    return count / (time.perf_counter() - started)


async def _delivery(address: str, session: int, rate: int, count: int) -> Delays:
    delays: list[float] = []
    begun = asyncio.Event()

    async def follow() -> None:
        connection, rest = await _Connection.open(address), b""
        async for chunk in connection.get(f"sessionId={session}", "text/event-stream"):
            begun.set()
            now = time.monotonic_ns()
            *blocks, rest = (rest + chunk).split(b"\n\n")
            for block in blocks:
                if sent := re.search(rb'"clientSeq":(\d+)', block):
                    delays.append((now - int(sent[1])) / 1e6)
            if len(delays) == count:
                connection.close()
                return

    following = asyncio.create_task(follow())
    async with asyncio.timeout(_PATIENCE):
        await begun.wait()
        free: list[_Connection] = []

        async def post() -> None:
            connection = free.pop() if free else await _Connection.open(address)
            await connection.post(_body(session, time.monotonic_ns()))
            free.append(connection)

        await at_rate(post, rate, count)
        await following
    for connection in free:
        connection.close()
    counted = sorted(delays[_WARM_UP:])
    return Delays(statistics.median(counted), counted[len(counted) * 99 // 100])


def _request(body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        _PATH.encode(), len(body), body,
    )  # fmt: skip


def _body(session: int, client_seq: int) -> bytes:
    return b'{"sessionId":%d,"actorId":"ada","clientSeq":%d,"type":"edit","payload":%b}' % (
        session, client_seq, PAYLOAD.encode(),
    )  # fmt: skip
