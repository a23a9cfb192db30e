"""The statements of appends find rows by index, also on tables that PostgreSQL knows nothing of yet."""

import psycopg
import pytest

from collab_service.storage.binary import (
    BYTEA_ARRAY,
    INT8,
    INT8_ARRAY,
    TEXT,
    TEXT_ARRAY,
    TIMESTAMPTZ_ARRAY,
)
from collab_service.storage.pipeline import Statement
from collab_service.storage.repository import appending

_TYPES = {
    INT8: "bigint",
    TEXT: "text",
    INT8_ARRAY: "bigint[]",
    TEXT_ARRAY: "text[]",
    BYTEA_ARRAY: "bytea[]",
    TIMESTAMPTZ_ARRAY: "timestamptz[]",
}
_STATEMENTS = [
    statement for statement in vars(appending).values() if isinstance(statement, Statement) and b"FROM" in statement.sql
]


@pytest.mark.parametrize("statement", _STATEMENTS, ids=lambda statement: statement.name.decode())
def test_a_plan_that_was_made_when_the_tables_were_new(database_url: str, statement: Statement) -> None:
    """It is kept, so no table may be scanned, however little it promises to cost when there is nothing in it."""
    types = ", ".join(_TYPES[oid] for oid in statement.parameter_types)
    values = ", ".join(["NULL"] * len(statement.parameter_types))
    with psycopg.connect(database_url) as connection:
        connection.execute(b"SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE it ({types}) AS ".encode() + statement.sql)
        plan = "\n".join(row[0] for row in connection.execute(f"EXPLAIN EXECUTE it ({values})".encode()))
    assert "Seq Scan on collab" not in plan
    assert "Bitmap" not in plan
