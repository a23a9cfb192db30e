"""Pairs of PostgreSQL servers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster
from collab_service.storage.embedded.accounts import postgres_account
from tests.operate.postgres import Postgres
from tests.waiting import until

NewPostgres = Callable[[], Postgres]


@pytest.fixture
def new_postgres(cluster: Cluster, directory: Path) -> Iterator[NewPostgres]:
    """Return a function that prepares a server."""
    account = postgres_account()
    assert account is not None
    with ExitStack() as stack:
        names = iter(("first", "second", "third"))
        yield lambda: stack.enter_context(Postgres(cluster.bin, directory / next(names), account))


@pytest.fixture
async def pair(new_postgres: NewPostgres) -> tuple[Postgres, Postgres]:
    """A migrated primary, and a standby that every commit waits for."""
    primary, standby = new_postgres(), new_postgres()
    primary.create()
    primary.start()
    schema.migrate(primary.url)
    standby.copy_of(primary)
    standby.start()
    async with await psycopg.AsyncConnection.connect(primary.url, autocommit=True) as connection:
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await connection.execute("SELECT pg_reload_conf()")

        async def is_synchronous() -> bool:
            cursor = await connection.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
            return await cursor.fetchone() is not None

        await until(is_synchronous, "replication")
    return primary, standby


def url_of(*servers: Postgres) -> str:
    """Return the URL that finds the one of several servers that takes writes."""
    places = ",".join(server.address for server in servers)
    return servers[0].url.replace(servers[0].address, places) + "?target_session_attrs=read-write"
