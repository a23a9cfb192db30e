"""Clients that fill the memory with what grpc holds for them: the process as a whole is bounded."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from collab_service import memory
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.http2 import UnfinishedRequests
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import append, events, new_session
from tests.waiting import until

pytestmark = pytest.mark.skipif(not memory.tells_resident_bytes(), reason="the system does not tell")

_SERVICE = "/collab_service.v1.CollabService"
_MOST_MB = 220
_CALLS, _SIZE = 100, 8_000_000
_GARBAGE = bytes(_SIZE)
_ROUND, _PAUSE = 1_000_000, 0.01
"""How fast the attack is, at most: 100 MB/s."""
_HARMLESS = 30_000_000
_PATIENCE = 30.0


@pytest.fixture(scope="module")
def bounded(new_database: Callable[[], str], run_directory: Path) -> Iterator[ServeProcess]:
    """A server of its own that may take little memory; in the end its log has nothing odd in it."""
    bound = ("--max-memory-bytes", str(_MOST_MB * 1024 * 1024))
    with ServeProcess("--database-url", new_database(), *bound, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0
        assert not [line for line in process.lines if line.get("level") in ("error", "critical")]
        assert "Traceback" not in process.text()


@pytest.fixture(scope="module")
def stub(bounded: ServeProcess) -> Iterator[CollabServiceStub]:
    """A client that behaves well."""
    with grpc.insecure_channel(bounded.grpc_address) as channel:
        yield CollabServiceStub(channel)


class _Attack:
    """Requests that lack their end, and a writer beside them."""

    def __init__(self, bounded: ServeProcess, stub: CollabServiceStub, connections: list[UnfinishedRequests]) -> None:
        self.connections = connections
        self.sent = 0
        self.most_mb = 0.0
        self._server = bounded
        self._stub = stub
        self._session_id = new_session(stub)
        self._appended = 0

    @property
    def unfinished(self) -> int:
        """Calls that are not ended."""
        return sum(connection.unfinished for connection in self.connections)

    async def go_on(self) -> None:
        """Send a little more, and append."""
        for connection in self.connections:
            self.sent += connection.send_more(_ROUND // len(self.connections))
        await asyncio.sleep(_PAUSE)
        await asyncio.to_thread(append, self._stub, self._session_id)
        self._appended += 1
        self.most_mb = max(self.most_mb, self._resident_mb())

    async def is_over(self) -> None:
        """The memory is given back; the writer's log is whole."""

        async def is_given_back() -> bool:
            return self._resident_mb() < _MOST_MB

        await until(is_given_back, "the memory is given back")
        for connection in self.connections:
            connection.transport.abort()
        numbers = [event.server_seq for event in events(self._stub, self._session_id)]
        assert numbers == list(range(1, self._appended + 1))

    def _resident_mb(self) -> float:
        return resident_kilobytes(self._server.process.pid) / 1024


@pytest.mark.parametrize(
    "path",
    [
        f"{_SERVICE}/AppendEvent",
        f"{_SERVICE}/AppendStream",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_requests_that_lack_their_end(bounded: ServeProcess, stub: CollabServiceStub, path: str) -> None:
    """While there is memory they may take their time; then they are ended, the memory is given back, others append."""

    def told() -> int:
        said = "too much memory is taken, calls that wait for their clients are ended"
        return sum(line["calls"] for line in bounded.lines if line["event"] == said)

    connections = [await UnfinishedRequests.open(bounded.grpc_address) for _ in range(4)]
    for connection in connections:
        for _ in range(_CALLS // len(connections)):
            connection.begin(path, _GARBAGE)
    told_before = told()
    attack = _Attack(bounded, stub, connections)
    while attack.sent < _HARMLESS:
        await attack.go_on()
    assert attack.unfinished == _CALLS
    async with asyncio.timeout(_PATIENCE):
        while attack.unfinished:
            await attack.go_on()
    assert told() - told_before == _CALLS
    assert attack.most_mb < 2 * _MOST_MB < _CALLS * _SIZE / 1e6
    await attack.is_over()


async def test_streams_that_cannot_be_ended(bounded: ServeProcess, stub: CollabServiceStub) -> None:
    """Where a client takes no answer, so that the end cannot be told, its connection is closed."""
    event = pb.NewEvent(binary=bytes(1_000))
    first = pb.AppendStreamRequest(request=pb.AppendEventsRequest(session_id=new_session(stub), events=[event]))
    connections = [await UnfinishedRequests.open(bounded.grpc_address, takes_answers=False) for _ in range(4)]
    for connection in connections:
        for _ in range(_CALLS // len(connections)):
            connection.begin(f"{_SERVICE}/AppendStream", _GARBAGE, before=first.SerializeToString())
    attack = _Attack(bounded, stub, connections)
    async with asyncio.timeout(_PATIENCE):
        while attack.unfinished:
            await attack.go_on()
    assert all(connection.closed.done() for connection in connections)
    assert attack.most_mb < 2.5 * _MOST_MB < _CALLS * _SIZE / 1e6
    await attack.is_over()


async def test_answers_that_nobody_takes(bounded: ServeProcess, stub: CollabServiceStub) -> None:
    """Where a client takes none of its answers, which hold the events that it has sent, its connection is closed."""
    connections = [await UnfinishedRequests.open(bounded.grpc_address, takes_answers=False) for _ in range(4)]
    event = pb.NewEvent(binary=bytes(500_000))
    requests = [
        pb.AppendEventRequest(session_id=new_session(stub), event=event).SerializeToString() for _ in connections
    ]
    attack = _Attack(bounded, stub, connections)
    async with asyncio.timeout(_PATIENCE):
        while not any(connection.closed.done() for connection in connections):
            for connection, request in zip(connections, requests, strict=True):
                for _ in range(4):
                    connection.begin(f"{_SERVICE}/AppendEvent", request)
            while attack.unfinished:
                await attack.go_on()
                for connection in connections:
                    connection.finish()
        for connection in connections:
            await connection.closed
    assert attack.most_mb < 2 * _MOST_MB
    await attack.is_over()


async def test_large_requests_of_follows_are_not_kept(bounded: ServeProcess, stub: CollabServiceStub) -> None:
    """A follow whose request was large, of fields that nobody knows, takes no room from the requests of others."""
    session_id = new_session(stub)
    request = pb.ListEventsRequest(session_id=session_id, follow=True).SerializeToString()
    unknown = b"\xfa\x3f\x80\x80\x80\x03" + bytes(6 * 1024 * 1024)  # field 1023, of 6 MiB
    async with grpc.aio.insecure_channel(bounded.grpc_address) as channel:
        list_events: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"{_SERVICE}/ListEvents")
        follows = []
        for _ in range(25):
            follows.append(list_events(request + unknown))
            await follows[-1].read()
            append(stub, session_id)
        for call in follows:
            call.cancel()
    assert [event.server_seq for event in events(stub, session_id)] == list(range(1, 26))


async def test_a_watch_that_takes_nothing(bounded: ServeProcess, stub: CollabServiceStub) -> None:
    """It keeps nobody else from being told of the server's health, nor the server from stopping (see `bounded`)."""
    connection = await UnfinishedRequests.open(bounded.grpc_address, takes_answers=False)
    for _ in range(3):
        connection.begin("/grpc.health.v1.Health/Watch", HealthCheckRequest().SerializeToString() + b"\x12\0")
    connection.finish()
    with grpc.insecure_channel(bounded.grpc_address) as channel:
        watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=_PATIENCE)
        assert next(watch).status == HealthCheckResponse.SERVING
        assert bounded.stop() == 0
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
