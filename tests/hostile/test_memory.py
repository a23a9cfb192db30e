"""Clients that fill the memory with what grpc holds for them: the process as a whole is bounded."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from collab_service import memory
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.http2 import UnfinishedRequests
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import append, events, new_session
from tests.waiting import until

_MOST_MB = 250
_CALLS, _SIZE = 100, 8_000_000
_MB_PER_ROUND, _PAUSE = 1, 0.01
"""How fast the attack is, at most: 100 MB/s."""
_HARMLESS_MB = 60


@pytest.fixture(scope="module")
def server(new_database: Callable[[], str], run_directory: Path) -> Iterator[ServeProcess]:
    """A server of its own that may take little memory."""
    bound = ("--max-memory-bytes", str(_MOST_MB * 1024 * 1024))
    with ServeProcess("--database-url", new_database(), *bound, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0


@pytest.mark.skipif(not memory.tells_resident_bytes(), reason="the system does not tell")
@pytest.mark.parametrize("method", ["AppendEvent", "AppendStream"])
async def test_requests_that_lack_their_end(server: ServeProcess, method: str) -> None:
    """While there is memory they may take their time; then they are ended, the memory is given back, others append."""

    def resident_mb() -> float:
        return resident_kilobytes(server.process.pid) / 1024

    def told() -> int:
        said = "too much memory is taken, requests that are long in coming are ended"
        return sum(line["calls"] for line in server.lines if line["event"] == said)

    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = CollabServiceStub(channel)
        session_id, told_before = new_session(stub), told()
        connections = [await UnfinishedRequests.open(server.grpc_address) for _ in range(4)]
        for connection in connections:
            for _ in range(_CALLS // len(connections)):
                connection.begin(method, _SIZE)

        def unfinished() -> int:
            return sum(connection.unfinished for connection in connections)

        clock = asyncio.get_running_loop().time
        began, sent, appended, most = clock(), 0, 0, 0.0
        while unfinished() and clock() < began + 30:
            for connection in connections:
                sent += connection.send_more(_MB_PER_ROUND * 1_000_000 // len(connections))
            await asyncio.sleep(_PAUSE)
            if sent < _HARMLESS_MB * 1_000_000:
                assert unfinished() == _CALLS
                began = clock()
            await asyncio.to_thread(append, stub, session_id)
            appended += 1
            most = max(most, resident_mb())
        assert not unfinished()
        assert told() - told_before == _CALLS
        assert most < 2 * _MOST_MB < _CALLS * _SIZE / 1e6

        async def is_given_back() -> bool:
            return resident_mb() < _MOST_MB

        await until(is_given_back, "the memory is given back")
        assert [event.server_seq for event in events(stub, session_id)] == list(range(1, appended + 1))
        for connection in connections:
            connection.transport.abort()
