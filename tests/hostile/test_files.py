"""Connections are open files, of which a process may have only so many."""

import resource
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.wire import connected
from tests.processes import ServeProcess
from tests.rpc.calls import append, new_session

_FILES = 300


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits the files of another process")
async def test_more_connections_than_files(database_url: str, directory: Path) -> None:
    """The files never run out: what is too much is refused before, and those who are there are served on."""
    server = ServeProcess("--database-url", database_url, cwd=directory)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (_FILES, _FILES))  # long before it has started
    with server, grpc.insecure_channel(server.grpc_address) as channel:
        told = server.wait_for("fewer connections than configured, by the limit on open files")
        assert told["files"] == _FILES
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        async with AsyncExitStack() as stack:
            for address in (server.http_address, server.grpc_address):
                for _ in range(2 * _FILES):
                    await stack.enter_async_context(connected(address))
            for _ in range(100):
                append(stub, session_id)
        append(stub, session_id)
        assert server.stop() == 0
        assert not [line for line in server.lines if line.get("level") in ("error", "critical")], server.text()
