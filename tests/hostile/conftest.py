"""A server of its own that takes few connections, and what must hold of it whatever is sent."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from tests.gateway.wire import Connection
from tests.processes import ServeProcess

CONNECTIONS = 20
"""What `attacked` takes at each port."""
_PATIENCE = 15.0


@pytest.fixture(scope="module")
def attacked_database_url(new_database: Callable[[], str]) -> str:
    """The database behind `attacked`."""
    return new_database()


@pytest.fixture(scope="module")
def attacked(attacked_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """A server that is thrown at; in the end its log has nothing odd in it, and it stops as always."""
    arguments = ("--database-url", attacked_database_url, "--max-connections", str(CONNECTIONS))
    with ServeProcess(*arguments, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0
        odd = [line for line in process.lines if line.get("level") in ("error", "critical") or "exception" in line]
        assert not odd, odd
        assert "Traceback" not in process.text()


def stored(database_url: str) -> tuple[int, int]:
    """Return how many sessions and events there are."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "SELECT (SELECT count(*) FROM collab_sessions), (SELECT count(*) FROM collab_events)"
        ).fetchone()
    assert row is not None
    return row


async def last_words(connection: Connection, sent: bytes) -> bytes:
    """Send bytes and nothing more, and return all that is said until the connection ends, or is cut."""
    said = b""
    async with asyncio.timeout(_PATIENCE):
        with suppress(OSError):  # inside, since a timeout is one, too
            connection.writer.write(sent)
            connection.writer.write_eof()
            while part := await connection.reader.read(65_536):
                said += part
    return said
