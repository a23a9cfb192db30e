"""Broken HTTP, slow HTTP and too much of it: others are served all the while, and nothing is stored."""

import asyncio
import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack

import httpx
import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import append, new_session, open_http
from tests.gateway.wire import Connection, connected, request_bytes
from tests.hostile.conftest import CONNECTIONS, last_words, stored
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc import calls
from tests.waiting import until

_POST = b"POST /api/collab/sessions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_BROKEN = {
    "length and chunks": _POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks and length": _POST + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": _POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length with a sign": _POST + b"content-length: +2\r\n\r\n{}",
    "a length too long": _POST + b"content-length: 99999999999999999999999\r\n\r\n{}",
    "a chunk's size": _POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk's size too long": _POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n{}\r\n",
    "a chunk longer than it says": _POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "another coding": _POST + b"transfer-encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a space before the colon": _POST + b"content-length : 2\r\n\r\n{}",
    "a folded header": _POST + b"x: a\r\n content-length: 2\r\n\r\n{}",
    "a NUL": _POST + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}",
    "many headers": _POST + b"x: y\r\n" * 20_000 + b"content-length: 2\r\n\r\n{}",
    "a huge header": _POST + b"x: " + b"y" * 100_000 + b"\r\ncontent-length: 2\r\n\r\n{}",
    "a body that is no JSON": _POST + b"content-length: 3\r\n\r\n\xff\xfe{",
    "the whole URL": b"POST http://elsewhere/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
    "only a host": b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    "up and up": b"GET /api/../../../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    "percent signs": b"GET /%00%ff%zz%2e%2e/%c0%ae HTTP/1.1\r\nhost: x\r\n\r\n",
    "a query of garbage": b"GET /api/collab/events?sessionId=%ff%00&types=%ed%a0%80&%zz HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.fixture
def http(attacked: ServeProcess) -> Iterator[httpx.Client]:
    """A client that behaves well."""
    with open_http(attacked.http_address) as http:
        yield http


@pytest.mark.parametrize("sent", _BROKEN.values(), ids=_BROKEN)
async def test_broken_requests(attacked: ServeProcess, attacked_database_url: str, sent: bytes) -> None:
    """Each is one well-formed 4xx of the contract, nothing behind it is taken for a request, and nothing is stored."""
    before = stored(attacked_database_url)
    async with connected(attacked.http_address) as connection:
        answer = await connection.ask(sent)
        body = await answer.body()
        assert 400 <= answer.status < 500, body
        error = json.loads(body)
        assert list(error) == ["error", "message", "code", "details"]
        assert answer.headers["x-request-id"]
    assert stored(attacked_database_url) == before


async def test_arbitrary_bytes(attacked: ServeProcess, attacked_database_url: str, http: httpx.Client) -> None:
    """Noise, and requests with noise in them, are answered with 4xx or not at all; the next client is served."""
    noise = random.Random(7)
    request = request_bytes(
        "/api/collab/events", method="POST", headers={"content-type": "application/json"}, body=b"{"
    )
    before = stored(attacked_database_url)
    for number in range(200):
        sent = bytearray(request if number % 2 else noise.randbytes(200))
        for _ in range(3):
            sent[noise.randrange(len(sent))] = noise.randrange(256)
        async with connected(attacked.http_address) as connection:
            said = await last_words(connection, bytes(sent))
            assert said == b"" or said.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), (bytes(sent), said)
    assert stored(attacked_database_url) == before
    append(http, new_session(http))


@pytest.mark.long
async def test_slow_requests(attacked: ServeProcess, http: httpx.Client) -> None:
    """A head that comes a byte at a time has 10 s, also where the connection has served; silence ends the same way."""
    async with connected(attacked.http_address) as slow, connected(attacked.http_address) as silent:
        served = await slow.ask(request_bytes("/healthz"))
        await served.body()
        feeding = asyncio.create_task(_feed(slow))
        started = asyncio.get_running_loop().time()
        answer = await slow.ask(b"")
        assert (answer.status, json.loads(await answer.body())["code"]) == (408, "REQUEST_TIMEOUT")
        assert 8 < asyncio.get_running_loop().time() - started < 15
        assert await slow.is_closed()
        assert await silent.is_closed()
        feeding.cancel()
    new_session(http)


async def _feed(connection: Connection) -> None:
    """Send a head that never ends, a byte at a time."""
    for byte in b"GET / HTTP/1.1\r\nx: " + b"y" * 1_000:
        connection.writer.write(bytes([byte]))
        await asyncio.sleep(0.2)  # which is the attack


async def test_bodies_that_there_is_no_room_for(attacked: ServeProcess, http: httpx.Client) -> None:
    """Of large bodies that come at once some are told OVERLOADED; what they hold is bounded, and small ones get in."""
    session_id = new_session(http)
    head = f"POST /api/collab/sessions/{session_id}/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    begun = f"{head}content-length: {8 * 1024 * 1024}\r\n\r\n".encode() + b" " * (8 * 1024 * 1024 - 1_000)
    async with AsyncExitStack() as stack:
        many = [await stack.enter_async_context(connected(attacked.http_address)) for _ in range(8)]
        asked = [asyncio.create_task(connection.ask(begun)) for connection in many]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        answer = done.pop().result()
        assert (answer.status, json.loads(await answer.body())["code"]) == (429, "OVERLOADED")
        assert answer.headers["retry-after"] == "1"
        append(http, session_id)

        async def is_kept_out() -> bool:
            connection = await stack.enter_async_context(connected(attacked.http_address))
            connection.writer.write(begun)
            await connection.writer.drain()
            return not await gets_in()

        async def gets_in() -> bool:
            event = {"sessionId": session_id, "payload": {"text": "x" * 200_000}}
            return (await asyncio.to_thread(http.post, "/api/collab/events", json=event)).status_code == 201

        # Those that have stopped give up their room to one that comes.
        await until(is_kept_out, "no room for a large body")
        await until(gets_in, "a large body beside those that have stopped")
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    append(http, session_id)


async def test_too_many_connections(attacked: ServeProcess, http: httpx.Client) -> None:
    """Whoever is idle for longest makes room, so a client that works is served however many do nothing."""
    async with AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(connected(attacked.http_address)) for _ in range(3 * CONNECTIONS)]
        session_id = new_session(http)
        append(http, session_id)
        assert await idle[0].is_closed()
        append(http, session_id)


async def test_connections_that_all_work(attacked: ServeProcess) -> None:
    """Where every connection carries out a request, a further one is told `OVERLOADED`, until one of them ends."""
    with open_http(attacked.http_address) as http:
        session_id = new_session(http)
    events = request_bytes(f"/api/collab/events?sessionId={session_id}", headers={"accept": "text/event-stream"})
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            follower = await stack.enter_async_context(connected(attacked.http_address))
            assert (await follower.ask(events)).status == 200
        async with connected(attacked.http_address) as further:
            answer = await further.ask(b"")
            assert (answer.status, json.loads(await answer.body())["code"]) == (503, "OVERLOADED")
            assert answer.headers["retry-after"] == "1"
            assert await further.is_closed()
    with open_http(attacked.http_address) as again:
        append(again, session_id)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_stalled_readers_of_large_events(server: ServeProcess, stub: CollabServiceStub, accept: str) -> None:
    """Hundreds who take nothing of large pages cost a budget, not a page each, and others read meanwhile."""
    session_id = calls.new_session(stub)
    for _ in range(4):
        calls.append(stub, session_id, binary=bytes(900_000))
    host, port = server.http_address.split(":")
    request = f"GET /api/collab/events?sessionId={session_id} HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\n\r\n".encode()
    before = resident_kilobytes(server.process.pid)
    with ExitStack() as stack:
        for _ in range(200):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            reader.connect((host, int(port)))
            reader.send(request)
        with open_http(server.http_address) as http:
            for _ in range(3):
                answer = http.get("/api/collab/events", params={"sessionId": session_id})
                assert len(answer.json()) == 4
                assert resident_kilobytes(server.process.pid) - before < 450 * 1024
