"""Server-sent events: every event once and in order, whatever is cut or restarted, to any number of followers."""

import json
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import open_http, refused
from tests.gateway.event_source import EventSource, Message, Parser
from tests.gateway.wire import connected, request_bytes
from tests.processes import GatewayProcess, ServeProcess, ServingProcess
from tests.rpc.calls import TIMEOUT, append, new_session
from tests.waiting import until

_FOLLOWERS = 200


def listed(http: httpx.Client, session_id: int) -> list[str]:
    """Return a session's events as lines."""
    answer = http.get(
        "/api/collab/events", params={"sessionId": session_id}, headers={"accept": "application/x-ndjson"}
    )
    return answer.text.splitlines()


async def test_events_as_they_come(http: httpx.Client, stub: CollabServiceStub, server: ServeProcess) -> None:
    """What is there, then `caught-up` with the head, then what comes: each with its number as id, as a list has it."""
    session_id = new_session(stub)
    for number in range(1, 4):
        append(stub, session_id, json=f'{{"n":\n{number}.0}}', actor_id="Zoë")
    append(stub, session_id, binary=b"\0\xff", signature=b"s")
    async with EventSource(server.http_address, session_id) as source:
        await source.until(lambda source: len(source.heads) == 1)
        for number in range(5, 55):
            append(stub, session_id, json=f'{{"n":{number}}}')
        await source.until(lambda source: len(source.numbers) == 54)
        assert source.messages[4] == Message("caught-up", '{"headServerSeq": 4}', "4")
        assert source.heads == sorted(set(source.heads))  # should it fall behind, it is told again
        assert [message for message in source.messages if message.type == "message"] == [
            Message("message", line, str(number)) for number, line in enumerate(listed(http, session_id), 1)
        ]
        assert (source.retry, len(source.answers)) == (2_000, 1)


async def test_an_empty_session(stub: CollabServiceStub, server: ServeProcess) -> None:
    """The head is told at once, also when there is nothing: a page need not wait to know that."""
    session_id = new_session(stub)
    async with EventSource(server.http_address, session_id) as source:
        await source.until(lambda source: bool(source.messages))
        assert source.messages == [Message("caught-up", '{"headServerSeq": 0}', "")]
        append(stub, session_id)
        await source.until(lambda source: source.numbers == [1])
        assert source.heads == [0]


async def test_it_passes_proxies(stub: CollabServiceStub, gateway: GatewayProcess) -> None:
    """Nobody on the way may keep it, change it, or hold it back; it is not packed, also when that was asked for."""
    async with EventSource(gateway.http_address, new_session(stub)) as source:
        await source.until(lambda source: source.heads == [0])
        headers = source.answers[0].headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store, no-transform"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers
    assert "content-length" not in headers
    assert headers["x-request-id"]


async def test_only_some_types(stub: CollabServiceStub, server: ServeProcess) -> None:
    """Only events of these types come; the last id moves on all the same, so that coming again begins near the head."""
    session_id = new_session(stub)
    for kind in ("a", "b", "ü", "c"):
        append(stub, session_id, type=kind)
    async with EventSource(server.http_address, session_id, "&types=a,%C3%BC") as source:
        await source.until(lambda source: bool(source.heads))
        assert (source.numbers, source.heads, source.last_event_id) == ([1, 3], [4], "4")
        for kind in ("b", "a", "b"):
            append(stub, session_id, type=kind)
        await source.until(lambda source: source.numbers == [1, 3, 6])
        await source.until(lambda source: source.last_event_id == "7")
        assert "heartbeat" in source.comments
    async with EventSource(server.http_address, session_id, "&types=none") as source:
        await source.until(lambda source: bool(source.heads))
        assert (source.messages, source.last_event_id) == ([Message("caught-up", '{"headServerSeq": 7}', "7")], "7")


async def test_a_limit(stub: CollabServiceStub, server: ServeProcess) -> None:
    """After so many events the stream ends, as it should."""
    session_id = new_session(stub)
    for _ in range(3):
        append(stub, session_id)
    async with EventSource(server.http_address, session_id, "&limit=2", once=True) as source:
        await source.until_ended()
        assert (source.numbers, source.clean_ends) == ([1, 2], 1)
    async with EventSource(server.http_address, session_id, "&limit=2&sinceServerSeq=2", once=True) as source:
        await source.until(lambda source: source.numbers == [3])
        append(stub, session_id)
        await source.until_ended()
        assert (source.numbers, source.clean_ends) == ([3, 4], 1)


@pytest.mark.parametrize(
    ("since", "last", "first"), [(0, "3", 4), (4, "2", 3), (2, "0", 1), (1, "", 2), (5, "5", None)]
)
async def test_where_it_begins(
    stub: CollabServiceStub, server: ServeProcess, since: int, last: str, first: int | None
) -> None:
    """After `sinceServerSeq`; after `Last-Event-ID` where there is one, since the address stays what it was."""
    session_id = new_session(stub)
    for _ in range(5):
        append(stub, session_id)
    path = f"/api/collab/events?sessionId={session_id}&sinceServerSeq={since}"
    async with connected(server.http_address) as connection:
        answer = await connection.ask(
            request_bytes(path, headers={"accept": "text/event-stream", "last-event-id": last})
        )
        parser, messages = Parser(), list[Message]()
        async for part in answer.parts():
            messages += parser.feed(part)
            if any(message.type == "caught-up" for message in messages):
                break
    ids = [message.last_event_id for message in messages if message.type == "message"]
    assert ids == ([] if first is None else [str(number) for number in range(first, 6)])


async def test_a_session_that_is_deleted(stub: CollabServiceStub, server: ServeProcess) -> None:
    """The stream ends, as it should; a browser comes again, hears 404, and stays away."""
    session_id = append(stub, new_session(stub)).event.session_id
    async with EventSource(server.http_address, session_id) as source:
        await source.until(lambda source: source.heads == [1])
        stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=TIMEOUT)
        last = await source.until_ended()
        assert (last.status, source.clean_ends, source.cuts) == (404, 1, 0)
        assert (source.numbers, source.heads) == ([1], [1])


async def test_many_followers(stub: CollabServiceStub, gateway: GatewayProcess) -> None:
    """200 at once get everything, in order; the inspector is told how many they are, and that they have left."""
    session_id = new_session(stub)
    with open_http(gateway.http_address) as http:

        def count() -> int:
            followers: int = http.get(f"/inspector/followers/{session_id}").json()["followers"]
            return followers

        async with AsyncExitStack() as stack:
            sources = [
                await stack.enter_async_context(EventSource(gateway.http_address, session_id))
                for _ in range(_FOLLOWERS)
            ]
            for source in sources:
                await source.until(lambda source: source.heads == [0])
            assert count() == _FOLLOWERS
            for _ in range(30):
                append(stub, session_id)
            for source in sources:
                await source.until(lambda source: len(source.numbers) == 30)
                assert source.numbers == list(range(1, 31))
                assert source.heads == sorted(set(source.heads))  # who falls behind is told again
                assert len(source.answers) == 1

        async def all_left() -> bool:
            return count() == 0

        await until(all_left, "the end of the followers")


async def test_a_follower_that_falls_behind(stub: CollabServiceStub, gateway: GatewayProcess) -> None:
    """One that does not read for a while misses nothing, and is told anew when it has reached the head."""
    session_id = new_session(stub)
    payload = json.dumps({"text": "x" * 30_000})
    path = f"/api/collab/events?sessionId={session_id}"
    async with connected(gateway.http_address, small=True) as connection:
        answer = await connection.ask(request_bytes(path, headers={"accept": "text/event-stream"}))
        parts, parser = answer.parts(), Parser()
        messages = parser.feed(await anext(parts))
        assert [message.type for message in messages] == ["caught-up"]
        batch = [pb.NewEvent(json=payload)] * 100
        for _ in range(20):  # 60 MB, more than fits on the way
            stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=batch), timeout=TIMEOUT)
        while messages[-1].last_event_id != "2000" or messages[-1].type != "caught-up":
            messages += parser.feed(await anext(parts))
    assert [message.last_event_id for message in messages if message.type == "message"] == [
        str(number) for number in range(1, 2_001)
    ]
    heads = [json.loads(message.data)["headServerSeq"] for message in messages if message.type == "caught-up"]
    assert heads[0] == 0
    assert heads[-1] == 2_000
    assert heads == sorted(set(heads))


class Writer:
    """Appends to a session, one event after the other, until told to stop."""

    def __init__(self, address: str, session_id: int) -> None:
        self.count = 0
        self._address = address
        self._session_id = session_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub = CollabServiceStub(channel)
            while not self._stop.wait(0.005):  # so that the test is not all about writing
                self.count = append(stub, self._session_id).event.server_seq

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop, once the last one is acknowledged."""
        self._stop.set()
        self._thread.join(TIMEOUT)

    def __exit__(self, *_: object) -> None:
        self.stop()


async def test_restarts(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str, directory: Path
) -> None:
    """Service and gateway are killed and started again while somebody writes: no event is missed, and none comes twice.

    While the service is away, the answer is a stream that ends and says when to come again.
    """
    session_id = new_session(stub)
    address, http_address = "127.0.0.1:0", "127.0.0.1:0"
    async with AsyncExitStack() as stack:
        writer = stack.enter_context(Writer(server.grpc_address, session_id))

        def start_service() -> ServeProcess:
            arguments = ("--database-url", server_database_url, "--http-address", "off")
            return stack.enter_context(ServeProcess(*arguments, cwd=directory, grpc_address=address))

        def start_gateway() -> GatewayProcess:
            return stack.enter_context(GatewayProcess(address, cwd=directory, http_address=http_address))

        service = start_service()
        address = service.grpc_address
        gateway = start_gateway()
        http_address = gateway.http_address
        source = await stack.enter_async_context(EventSource(http_address, session_id))
        await source.until(lambda source: len(source.numbers) > 20)

        kill(service)
        ends = source.clean_ends
        await source.until(lambda source: source.clean_ends > ends + 2)
        assert (source.retry, source.refused) == (2_000, 0)
        start_service()
        reached = len(source.numbers)
        await source.until(lambda source: len(source.numbers) > reached + 20)

        kill(gateway)
        await source.until(lambda source: source.refused > 0)
        start_gateway()
        reached = len(source.numbers)
        await source.until(lambda source: len(source.numbers) > reached + 20)

        writer.stop()
        await source.until(lambda source: len(source.numbers) == writer.count)
        assert source.numbers == list(range(1, writer.count + 1))
        assert {answer.status for answer in source.answers} == {200}


def kill(process: ServingProcess) -> None:
    """End a process without a word."""
    process.process.kill()
    process.wait()


@pytest.mark.long
async def test_heartbeats(stub: CollabServiceStub, server: ServeProcess, gateway: GatewayProcess) -> None:
    """A comment comes whenever nothing else has for ten seconds, so that nobody on the way takes it for dead."""
    session_id = new_session(stub)
    async with (
        EventSource(server.http_address, session_id) as one,
        EventSource(gateway.http_address, session_id, "&types=a") as other,
    ):
        for source in (one, other):
            await source.until(lambda source: len(source.comments) == 2)
            assert (source.comments, source.heads, source.numbers) == (["heartbeat"] * 2, [0], [])
            assert len(source.answers) == 1


def test_a_stream_that_cannot_begin(http: httpx.Client) -> None:
    """What coming again does not help is an error like any other, at which a browser stays away."""
    for query, status, code in (
        ({"sessionId": "999999999999"}, 404, "SESSION_NOT_FOUND"),
        ({"sessionId": "0"}, 400, "INVALID_REQUEST"),
        ({"sessionId": "1", "types": ""}, 400, "INVALID_REQUEST"),
    ):
        answer = http.get("/api/collab/events", params=query, headers={"accept": "text/event-stream"})
        refused(answer, status, code)
