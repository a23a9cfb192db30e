"""Clients of the shared server: directly, and through a proxy that cuts."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from collab_service.client import CollabClient
from tests.client.calls import QUICK
from tests.processes import ServeProcess
from tests.tcp import TcpProxy


@pytest.fixture(scope="session")
def small_database_url(new_database: Callable[[], str]) -> str:
    """The database behind `small_server`."""
    return new_database()


@pytest.fixture(scope="session")
def small_server(small_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """A server that takes one follower, and lets one append wait."""
    limits = ("--max-followers", "1", "--max-waiting-appends", "1")
    with ServeProcess("--database-url", small_database_url, *limits, cwd=run_directory) as process:
        yield process


@pytest.fixture
async def client(server: ServeProcess) -> AsyncIterator[CollabClient]:
    """A client of the shared server."""
    async with CollabClient(server.grpc_address) as client:
        yield client


@pytest.fixture
async def proxy(server: ServeProcess) -> AsyncIterator[TcpProxy]:
    """A proxy in front of the shared server."""
    async with TcpProxy(server.grpc_address) as proxy:
        yield proxy


@pytest.fixture
async def cut_client(proxy: TcpProxy) -> AsyncIterator[CollabClient]:
    """A client that reaches the shared server through the proxy."""
    async with CollabClient(proxy.address, retry=QUICK) as client:
        yield client
