"""The gateway inside the shared server, one in a process of its own, and one whose service accepts little."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.conftest import assert_no_call_was_left
from tests.gateway.calls import open_http, write
from tests.processes import GatewayProcess, ServeProcess
from tests.rpc.calls import new_session

ORIGIN = "https://app.example"
"""Whose pages may call the gateway of `small_server` from a browser."""
SMALL_BODY = 2_000
"""Bytes that it takes as a body."""


@pytest.fixture(scope="session")
def http(server: ServeProcess) -> Iterator[httpx.Client]:
    """A client of the gateway inside the shared server."""
    with open_http(server.http_address) as http:
        yield http


@pytest.fixture(scope="session")
def gateway(server: ServeProcess, run_directory: Path) -> Iterator[GatewayProcess]:
    """A gateway of its own in front of the shared server."""
    with GatewayProcess(server.grpc_address, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="session")
def small_database_url(new_database: Callable[[], str]) -> str:
    """The database behind `small_server`."""
    return new_database()


@pytest.fixture(scope="session")
def small_server(small_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """A server that takes one follower, lets one append wait, and lets one origin's pages call it."""
    limits = ("--max-followers", "1", "--max-waiting-appends", "1", "--max-body-bytes", str(SMALL_BODY))
    arguments = ("--database-url", small_database_url, "--cors-origin", ORIGIN, *limits)
    with ServeProcess(*arguments, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0
        assert_no_call_was_left(process)


@pytest.fixture(scope="session")
def small_http(small_server: ServeProcess) -> Iterator[httpx.Client]:
    """A client of the gateway inside `small_server`."""
    with open_http(small_server.http_address) as http:
        yield http


@pytest.fixture(scope="session")
def large(stub: CollabServiceStub) -> int:
    """A session of 60 MB, more than fits into what lies between the database and a client that does not read."""
    session_id = new_session(stub)
    write(stub, session_id, count=2_000, payload=json.dumps({"text": "x" * 30_000}), at_once=100)
    return session_id
