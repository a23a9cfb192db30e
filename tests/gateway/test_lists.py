"""Long lists: whole, in bounded memory; cut off and never closed when they fail; given up when the client leaves."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import open_http, write
from tests.gateway.wire import ARRAY, EVENTS, LINES, WireError, connected, list_request
from tests.memory import resident_kilobytes
from tests.processes import GatewayProcess, ServeProcess
from tests.rpc.calls import new_session

MILLION = 1_000_000


@pytest.fixture(scope="module")
def many(stub: CollabServiceStub) -> int:
    """A session of 20,000 small events."""
    session_id = new_session(stub)
    write(stub, session_id, count=20_000, payload='{"text":"x"}', at_once=1_000)
    return session_id


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_long_list_is_whole(gateway: GatewayProcess, many: int, encoding: str) -> None:
    """20,000 events come in order, none twice and none missing, as an array and as lines, packed or not."""
    query = {"sessionId": many}
    with open_http(gateway.http_address) as http:
        for accept, read in ((ARRAY, json.loads), (LINES, lambda text: list(map(json.loads, text.splitlines())))):
            answer = http.get(
                "/api/collab/events", params=query, headers={"accept": accept, "accept-encoding": encoding}
            )
            assert answer.headers.get("content-encoding", "identity") == encoding
            assert answer.headers["transfer-encoding"] == "chunked"
            assert [event["serverSeq"] for event in read(answer.text)] == list(range(1, 20_001))


async def test_a_long_list_over_http_1_0(gateway: GatewayProcess, many: int) -> None:
    """Also for clients that keep no connection: the list is whole, and the connection closed."""
    async with connected(gateway.http_address) as connection:
        answer = await connection.ask(list_request(many, version="1.0"))
        assert len(json.loads(await answer.body())) == 20_000
        assert await connection.is_closed()


@pytest.mark.parametrize("accept", [ARRAY, LINES, EVENTS])
async def test_a_client_that_leaves(server: ServeProcess, gateway: GatewayProcess, large: int, accept: str) -> None:
    """The call behind a list, or behind a stream that follows, ends when the client leaves half-way."""
    for address in (server.http_address, gateway.http_address):
        async with connected(address, small=True) as connection:
            answer = await connection.ask(list_request(large, accept))
            assert answer.status == 200
            parts = answer.parts()
            assert await anext(parts)
            connection.cut()
        request_id = answer.headers["x-request-id"]
        await asyncio.to_thread(server.wait_for, "call was cancelled", request_id=request_id, method="ListEvents")


async def test_a_follower_that_leaves_while_nothing_comes(
    server: ServeProcess, gateway: GatewayProcess, stub: CollabServiceStub
) -> None:
    """Nobody waits for the next event to find out that a follower is gone."""
    session_id = new_session(stub)
    for address in (server.http_address, gateway.http_address):
        async with connected(address) as connection:
            answer = await connection.ask(list_request(session_id, EVENTS))
            assert b"caught-up" in await anext(answer.parts())
        request_id = answer.headers["x-request-id"]
        await asyncio.to_thread(server.wait_for, "call was cancelled", request_id=request_id, method="ListEvents")


async def test_a_list_that_fails_half_way(large: int, server_database_url: str, directory: Path) -> None:
    """When the service is killed in the middle, the connection is cut: nobody can take the list for whole.

    An array is not closed, chunks have no end, for HTTP/1.1 and 1.0; and the gateway's log says it in one line each.
    """
    asked = [(ARRAY, "1.1"), (ARRAY, "1.0"), (LINES, "1.1"), (LINES, "1.0")]
    with (
        ServeProcess("--database-url", server_database_url, cwd=directory) as service,
        GatewayProcess(service.grpc_address, cwd=directory) as gateway,
    ):
        async with (
            connected(gateway.http_address, small=True) as first,
            connected(gateway.http_address, small=True) as second,
            connected(gateway.http_address, small=True) as third,
            connected(gateway.http_address, small=True) as fourth,
        ):
            connections = (first, second, third, fourth)
            answers = [
                await connection.ask(list_request(large, accept, version))
                for connection, (accept, version) in zip(connections, asked, strict=True)
            ]
            bodies = []
            for answer in answers:
                assert answer.status == 200
                parts = answer.parts()
                bodies.append((await anext(parts), parts))
            service.process.kill()
            service.wait()
            for (accept, _), (start, parts) in zip(asked, bodies, strict=True):
                body = bytearray(start)
                with pytest.raises(WireError):
                    async for part in parts:
                        body += part
                assert len(body) < 60_000_000
                if accept == ARRAY:
                    assert body.startswith(b'[{"id":')
                    with pytest.raises(ValueError, match=r"delimiter|Expecting|Unterminated"):
                        json.loads(body)
        for answer in answers:
            request_id = answer.headers["x-request-id"]
            line = await asyncio.to_thread(gateway.wait_for, "request was cut off", request_id=request_id)
            assert line["code"] == "Unavailable"
        with open_http(gateway.http_address) as http:
            assert http.get("/healthz").status_code == 200
        assert gateway.stop() == 0
        assert not [line for line in gateway.lines if line.get("level") != "info"], gateway.text()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_million_events(server: ServeProcess, stub: CollabServiceStub, directory: Path) -> None:
    """A million events come whole, as an array and as lines, packed or not, in bounded memory."""
    session_id = new_session(stub)
    write(stub, session_id, count=MILLION, payload='{"text":"' + "x" * 40 + '"}', at_once=1_000)
    count: dict[str, Callable[[bytes], int]] = {
        ARRAY: lambda part: part.count(b'"chainHash":'),
        LINES: lambda part: part.count(b"\n"),
    }
    with GatewayProcess(server.grpc_address, cwd=directory) as gateway, open_http(gateway.http_address) as http:
        http.get("/api/collab/events", params={"sessionId": session_id, "limit": 10_000})
        before = resident_kilobytes(gateway.process.pid)
        for accept in (ARRAY, LINES):
            for encoding in ("identity", "gzip"):
                most, seen, last, ending = before, 0, b"", b""
                headers = {"accept": accept, "accept-encoding": encoding}
                query = {"sessionId": session_id}
                with http.stream("GET", "/api/collab/events", params=query, headers=headers) as answer:
                    for part in answer.iter_bytes():
                        whole = last + part
                        seen += count[accept](whole) - count[accept](last)
                        last, ending = whole[-20:], whole[-3:]
                        most = max(most, resident_kilobytes(gateway.process.pid))
                assert seen == MILLION
                assert ending.endswith(b"}]" if accept == ARRAY else b"}\n")
                assert most - before < 50 * 1024, (accept, encoding)
