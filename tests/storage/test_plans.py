"""The statements of appends find rows by index, also on tables that PostgreSQL knows nothing of yet."""

import psycopg
import pytest

from collab_service.storage.pipeline import Statement
from collab_service.storage.repository import appending

_STATEMENTS = [
    statement for statement in vars(appending).values() if isinstance(statement, Statement) and b"FROM" in statement.sql
]


@pytest.mark.parametrize("statement", _STATEMENTS, ids=lambda statement: statement.name.decode())
def test_a_plan_that_was_made_when_the_tables_were_new(database_url: str, statement: Statement) -> None:
    """It is kept, so no table may be scanned, however little it promises to cost when there is nothing in it."""
    values = ", ".join(["NULL"] * len(statement.parameter_types))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(b"SET plan_cache_mode = force_generic_plan")
        connection.pgconn.prepare(statement.name, statement.sql, statement.parameter_types)
        explained = connection.execute(b"EXPLAIN EXECUTE " + statement.name + f" ({values})".encode())
        plan = "\n".join(row[0] for row in explained)
    assert "Scan" in plan
    assert "Seq Scan on collab" not in plan
    assert "Bitmap" not in plan
