"""The log without gRPC: services on a database of the test's own."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from collab_service.config import Config
from collab_service.log.service import LogService
from tests.log.logs import unseen
from tests.proxy import PostgresProxy

StartService = Callable[..., LogService]


@pytest.fixture
async def start_service(database_url: str) -> AsyncIterator[StartService]:
    """Return a function that starts a service, as another process on the same database would."""
    deaths: list[str] = []
    async with AsyncExitStack() as stack:

        def start(url: str = database_url, **settings: Any) -> LogService:
            config = Config(data_dir=Path("/nonexistent"), **settings)
            service = LogService(config, url, metrics=unseen(), on_death=lambda: deaths.append("died"))
            service.start()
            stack.push_async_callback(service.stop, 5)
            return service

        yield start
    assert not deaths


@pytest.fixture
async def service(start_service: StartService) -> LogService:
    """One service."""
    return start_service()


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[PostgresProxy]:
    """A proxy in front of the test's database; asked for before `start_service`, it outlives the services."""
    async with PostgresProxy(database_url) as proxy:
        yield proxy
