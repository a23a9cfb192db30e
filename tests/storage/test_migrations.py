"""The schema: migrated up and down on real events, equal to the declared tables, and by several at once."""

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, pool

import collab_service
from collab_service.config import Config
from collab_service.log.service import LogService
from collab_service.model import NewEvent
from collab_service.storage import schema
from collab_service.storage.embedded import Cluster
from collab_service.storage.schema import SchemaState, schema_state
from collab_service.storage.tables import metadata
from tests.conftest import database_url_of
from tests.log.logs import append, new_session, read_checked, unseen
from tests.processes import COLLAB, clean_environment, collab
from tests.waiting import until

HEAD = "0002"

# What PostgreSQL itself says of our tables: columns, indexes with their conditions, constraints, identities.
_DESCRIBE = """
SELECT 'column', c.relname, a.attname,
       concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                 pg_get_serial_sequence(c.relname, a.attname), pg_get_expr(d.adbin, d.adrelid))
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relname IN ('collab_sessions', 'collab_events') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE tablename LIKE 'collab%'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE conrelid::regclass::text LIKE 'collab%'
ORDER BY 1, 2, 3
"""

# Everything that is ours in a database, of whatever kind.
_OBJECTS = """
SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname <> ALL (%s)
UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typname LIKE 'collab%%'
"""
_ALEMBICS_OWN = ["alembic_version", "alembic_version_pkc"]


@pytest.fixture
def empty_database(cluster: Cluster) -> str:
    """A database with nothing in it."""
    name = f"empty_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return database_url_of(cluster, name)


@contextmanager
def alchemy(url: str) -> Iterator[Connection]:
    """Connect by SQLAlchemy."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        yield connection


@asynccontextmanager
async def log_service(url: str) -> AsyncIterator[LogService]:
    """Run a service on a database."""

    def died() -> None:
        raise AssertionError("a background task died")

    service = LogService(Config(data_dir=Path("/nonexistent")), url, metrics=unseen(), on_death=died)
    service.start()
    yield service
    await service.stop(5)


def objects(url: str) -> list[str]:
    """Return the names of everything of ours in a database."""
    with psycopg.connect(url) as connection:
        return sorted(name for (name,) in connection.execute(_OBJECTS, (_ALEMBICS_OWN,)))


def count_events(url: str) -> dict[int, int]:
    """Return how many events each session has."""
    with psycopg.connect(url) as connection:
        return dict(connection.execute("SELECT session_id, count(*) FROM collab_events GROUP BY 1").fetchall())


async def write_events(url: str) -> None:
    """Write sessions with every kind of event, and read them back."""
    batch = [
        NewEvent(),
        NewEvent("ada", 0, "insert", '{"text":"héllo 😀"}', "sha256:1", b"sig", "k-1"),
        NewEvent(payload=b"\x00\x01\xff"),
    ]
    async with log_service(url) as service:
        for _ in range(3):
            session_id = await new_session(service)
            await append(service, session_id, *batch)
            assert [event.content for event in await read_checked(service, session_id)] == batch


async def test_up_down_and_up_again_with_events_in_it(empty_database: str) -> None:
    """A migration can be taken back on a database that is in use, leaves nothing behind, and can be made again."""
    assert objects(empty_database) == []
    assert schema.migrate(empty_database) == (None, HEAD)
    made = objects(empty_database)
    await write_events(empty_database)
    assert len(count_events(empty_database)) == 3

    assert schema.migrate(empty_database, target="base") == (HEAD, None)
    assert objects(empty_database) == []

    assert schema.migrate(empty_database) == (None, HEAD)
    assert objects(empty_database) == made
    assert count_events(empty_database) == {}
    await write_events(empty_database)
    assert schema.migrate(empty_database) == (HEAD, HEAD)
    assert len(count_events(empty_database)) == 3


def test_migrated_equals_declared(database_url: str, empty_database: str) -> None:
    """The declared tables are the migrated ones: for Alembic, and in PostgreSQL's own words, conditions included."""
    with alchemy(database_url) as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with alchemy(empty_database) as connection:
        metadata.create_all(connection)
        connection.commit()
    with psycopg.connect(database_url) as migrated, psycopg.connect(empty_database) as declared:
        found = migrated.execute(_DESCRIBE).fetchall()
        assert found == declared.execute(_DESCRIBE).fetchall()
    assert sum(" WHERE " in str(definition) for *_, definition in found) == 6


def test_alembic_would_see_a_difference(database_url: str) -> None:
    """The comparison above can fail: a column, an index or a condition too many is told."""
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE collab_events ADD COLUMN more text")
        connection.execute("DROP INDEX collab_events_client_seq_idx")
    with alchemy(database_url) as connection:
        kinds = {difference[0] for difference in compare_metadata(MigrationContext.configure(connection), metadata)}
    assert kinds == {"remove_column", "add_index"}


def test_migrations_have_one_head() -> None:
    """There is one way up, from nothing to the newest schema."""
    script = schema._script()
    assert script.get_heads() == [HEAD]
    assert script.get_bases() == ["0001"]


def test_several_migrations_at_once(empty_database: str) -> None:
    """Five `collab migrate` at the same moment all succeed: one works, the others find nothing to do."""
    processes = [
        subprocess.Popen(
            [*COLLAB, "migrate", "--database-url", empty_database],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
        )
        for _ in range(5)
    ]
    told = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, told
    assert sorted(told) == [
        f"The schema is up to date (revision {HEAD}).",
    ] * 4 + [f"The schema went from nothing to revision {HEAD}."]
    assert schema_state(empty_database) is SchemaState.CURRENT


async def test_a_migration_waits_for_another(empty_database: str) -> None:
    """While one migration holds the lock, a second one waits and does not fail."""
    async with await psycopg.AsyncConnection.connect(empty_database, autocommit=True) as connection:

        async def is_waiting() -> bool:
            cursor = await connection.execute(
                "SELECT 1 FROM pg_stat_activity"
                " WHERE application_name = 'collab-migrate' AND datname = current_database()"
            )
            return await cursor.fetchone() is not None

        await connection.execute("SELECT pg_advisory_lock(%s)", (schema._MIGRATION_LOCK,))
        waiting = asyncio.create_task(asyncio.to_thread(collab, "migrate", "--database-url", empty_database))
        await until(is_waiting, "waiting for the lock")
        assert objects(empty_database) == []
        await connection.execute("SELECT pg_advisory_unlock(%s)", (schema._MIGRATION_LOCK,))
        result = await waiting
    assert result.returncode == 0
    assert "went from nothing" in result.stdout


def test_schema_state(empty_database: str) -> None:
    """No schema, ours, and one of a newer version are told apart."""
    assert schema_state(empty_database) is SchemaState.MISSING
    schema.migrate(empty_database)
    assert schema_state(empty_database) is SchemaState.CURRENT
    write_revision(empty_database, "9999")
    assert schema_state(empty_database) is SchemaState.NEWER


def test_an_older_schema_is_told(empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that a known migration made, but not the newest one, is older; migrating brings it up."""
    schema.migrate(empty_database)
    location = Path(schema._script().dir)
    copy = tmp_path / "migrations"
    (copy / "versions").mkdir(parents=True)
    for file in (location / "env.py", *(location / "versions").glob("*.py")):
        (copy / file.relative_to(location)).write_text(file.read_text())
    (copy / "versions" / "later.py").write_text(
        f"from alembic import op\nrevision = 'later'\ndown_revision = '{HEAD}'\n"
        "def upgrade() -> None:\n    op.execute('CREATE TABLE collab_later (id int)')\n"
    )
    (tmp_path / "__init__.py").touch()
    # Where the migrations are is found beside the package, or inside it as in a wheel.
    monkeypatch.setattr(collab_service, "__file__", str(tmp_path / "__init__.py"))
    assert schema_state(empty_database) is SchemaState.OLDER
    assert schema.migrate(empty_database) == (HEAD, "later")
    assert schema_state(empty_database) is SchemaState.CURRENT
    monkeypatch.undo()
    assert schema_state(empty_database) is SchemaState.NEWER


def test_a_newer_schema_is_left_alone(database_url: str) -> None:
    """A version of the service that a newer one has overtaken neither fails at migrating nor takes anything back."""
    write_revision(database_url, "9999")
    before = objects(database_url)
    assert schema.migrate(database_url) == ("9999", "9999")
    result = collab("migrate", "--database-url", database_url)
    assert (result.returncode, result.stdout) == (0, "The schema is up to date (revision 9999).\n")
    assert objects(database_url) == before
    assert schema_state(database_url) is SchemaState.NEWER


async def test_deleting_sessions_by_hand_takes_their_events_along(database_url: str) -> None:
    """An operator's DELETE in SQL leaves no events behind, of one session or of several, and touches no other."""
    await write_events(database_url)
    await write_events(database_url)
    *deleted, kept = sorted(count_events(database_url))
    with psycopg.connect(database_url) as connection:
        connection.execute("DELETE FROM collab_sessions WHERE id = %s", (deleted[0],))
    assert sorted(count_events(database_url)) == [*deleted[1:], kept]
    with psycopg.connect(database_url) as connection:
        connection.execute("DELETE FROM collab_sessions WHERE id = ANY(%s)", (deleted,))
    assert count_events(database_url) == {kept: 3}


async def test_a_delete_by_hand_that_is_rolled_back_keeps_the_events(database_url: str) -> None:
    """The events go in the same transaction as their session."""
    await write_events(database_url)
    before = count_events(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("DELETE FROM collab_sessions")
        assert connection.execute("SELECT count(*) FROM collab_events").fetchone() == (0,)
        connection.rollback()
    assert count_events(database_url) == before


def write_revision(url: str, revision: str) -> None:
    """Make a database look migrated to some revision."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = %s", (revision,))


def test_a_database_that_cannot_hold_every_text_is_refused(cluster: Cluster) -> None:
    """Only UTF-8 holds what people write: another encoding is refused in a sentence, and nothing is made in it."""
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
    url = database_url_of(cluster, "latin")
    with pytest.raises(schema.UnsuitableDatabase, match="LATIN1"):
        schema.migrate(url)
    result = collab("migrate", "--database-url", url)
    assert result.returncode == 1
    assert "encoded in LATIN1" in result.stderr
    assert "Traceback" not in result.stderr
