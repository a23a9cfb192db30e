"""The statements of appends find rows by index, whatever PostgreSQL knows of the tables."""

import re
from collections.abc import Callable

import psycopg
import pytest

from collab_service.storage.database import Database
from collab_service.storage.pipeline import Statement
from collab_service.storage.repository import appending
from tests.log.logs import unseen

_STATEMENTS = [
    statement for statement in vars(appending).values() if isinstance(statement, Statement) and b"FROM" in statement.sql
]


@pytest.fixture(scope="module")
def new_tables(new_database: Callable[[], str]) -> str:
    """Tables that PostgreSQL knows nothing of yet."""
    return new_database()


@pytest.fixture(scope="module")
def empty_tables(new_database: Callable[[], str]) -> str:
    """Tables that PostgreSQL knows to be empty, as they are once all sessions were deleted."""
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) collab_sessions, collab_events")
    return url


@pytest.mark.parametrize("tables", ["new_tables", "empty_tables"])
@pytest.mark.parametrize("statement", _STATEMENTS, ids=lambda statement: statement.name.decode())
async def test_a_plan_that_is_kept(request: pytest.FixtureRequest, tables: str, statement: Statement) -> None:
    """No table may be scanned, nor all of an index, however little it promises to cost with nothing in it."""
    values = ", ".join(["NULL"] * len(statement.parameter_types))
    database = Database(request.getfixturevalue(tables), metrics=unseen().database.pool("appends"))
    async with await database.connect() as connection:
        await connection.execute(b"SET plan_cache_mode = force_generic_plan")
        connection.pgconn.prepare(statement.name, statement.sql, statement.parameter_types)
        explained = await connection.execute(b"EXPLAIN EXECUTE " + statement.name + f" ({values})".encode())
        plan = "\n".join([row[0] async for row in explained])
    assert "Scan" in plan
    assert "Seq Scan on collab" not in plan
    assert "Bitmap" not in plan
    assert "on collab_sessions" not in re.sub(
        "using collab_sessions_pkey on collab_sessions|Update on collab_sessions", "", plan
    )
