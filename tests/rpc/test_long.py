"""A session of a million events: read in bounded memory, deleted while others work."""

import statistics
import time
from pathlib import Path

import grpc
import psycopg
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import append, failure, new_session

MILLION = 1_000_000


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_million_events(database_url: str, directory: Path) -> None:
    """A million events are read back whole in bounded memory, and deleted in steps that nobody notices."""
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session, other = new_session(stub), new_session(stub)
        batch = [pb.NewEvent(json='{"text":"' + "x" * 40 + '"}')] * 1000
        for _ in range(MILLION // 1000):
            stub.AppendEvents(pb.AppendEventsRequest(session_id=session, events=batch))
        before = resident_kilobytes(server.process.pid)
        most, last = before, 0
        for message in stub.ListEvents(pb.ListEventsRequest(session_id=session)):
            assert message.events[0].server_seq == last + 1
            last = message.events[-1].server_seq
            assert last == message.events[0].server_seq + len(message.events) - 1
            most = max(most, resident_kilobytes(server.process.pid))
        assert last == MILLION
        assert most - before < 50 * 1024

        stub.DeleteSession(pb.DeleteSessionRequest(session_id=session))
        assert failure(lambda: append(stub, session)).reason == "SESSION_NOT_FOUND"
        waits = []
        deadline = time.monotonic() + 300
        with psycopg.connect(database_url, autocommit=True) as connection:
            query = "SELECT count(*) FROM collab_sessions WHERE id = %s"
            while (row := connection.execute(query, (session,)).fetchone()) and row[0]:
                assert time.monotonic() < deadline
                started = time.monotonic()
                append(stub, other)
                waits.append(time.monotonic() - started)
            left = connection.execute("SELECT count(*) FROM collab_events WHERE session_id = %s", (session,)).fetchone()
        assert left == (0,)
        assert len(waits) > 100
        assert statistics.median(waits) < 0.1
        assert max(waits) < 5
