"""Rolling upgrades: the schema moves on while the release before writes and reads."""

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

import collab_service
from collab_service.client import CollabClient
from collab_service.model.errors import LockTimeout
from collab_service.storage import schema
from collab_service.storage.schema import SchemaState, schema_state
from tests.operate.test_failover import Writers, follow
from tests.processes import ServeProcess
from tests.waiting import until

_LONGEST_PAUSE = 2.0 + 2.0
"""Seconds that an append may take meanwhile: the migration's `lock_timeout`, and what a busy machine adds."""

_MADE_UP = """
import sqlalchemy as sa
from alembic import op

revision = "made_up"
down_revision = "{head}"

def upgrade():
    op.add_column("collab_events", sa.Column("made_up", sa.Text))
    with op.get_context().autocommit_block():
        op.create_index(
            "collab_events_made_up_idx", "collab_events", ["session_id", "made_up"],
            postgresql_concurrently=True, if_not_exists=True,
        )
"""
"""What the next release may bring: a column that may be null, and an index that is built beside writers."""


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let this process be the next release, with one migration more, until it is undone."""
    script = schema._script()
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    for file in (Path(script.dir) / "env.py", *Path(script.versions).glob("*.py")):
        (tmp_path / "migrations" / file.relative_to(script.dir)).write_text(file.read_text())
    (versions / "made_up.py").write_text(_MADE_UP.format(head=script.get_current_head()))
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(collab_service, "__file__", str(tmp_path / "__init__.py"))
    return monkeypatch


async def test_this_release_works_while_the_next_one_migrates(
    database_url: str, directory: Path, next_release: pytest.MonkeyPatch
) -> None:
    """Writers and followers go on while it migrates, twice at once, even behind a transaction that never ends."""
    arguments = ("--database-url", database_url)
    with ServeProcess(*arguments, cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client:
            session, _ = await client.create_session()
            seen: dict[int, str] = {}
            follower = asyncio.create_task(follow(client, session.id, seen))
            writers = Writers(client, [session.id])
            await writers.more(20)
            async with await psycopg.AsyncConnection.connect(database_url) as reader:
                await reader.execute("SELECT count(*) FROM collab_events")  # as a dump does, for hours
                migrations = [asyncio.create_task(asyncio.to_thread(schema.migrate, database_url)) for _ in range(2)]
                asked = time.monotonic()

                async def went_on() -> bool:
                    return time.monotonic() > asked + schema._LOCK_PAUSE + 2 and writers.times[-1] > asked + 2

                await until(went_on, "an append while the migration waits")
                assert not any(migration.done() for migration in migrations)
            revisions = sorted([await migration for migration in migrations], key=str)
            assert {after for _, after in revisions} == {"made_up"}
            await writers.more(20)
            await writers.stop()
            assert max(later - earlier for earlier, later in pairwise(writers.times)) < _LONGEST_PAUSE
            stored = {event.server_seq: event.idempotency_key async for event in client.read(session.id)}
            assert stored == writers.acknowledged[session.id]

            async def has_seen_all() -> bool:
                return seen == stored

            await until(has_seen_all, "the follower")
            follower.cancel()
    next_release.undo()
    assert schema_state(database_url) is SchemaState.NEWER
    with ServeProcess(*arguments, cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client:
            assert [event.server_seq async for event in client.read(session.id)] == list(stored)


async def test_the_release_before_works_while_this_one_migrates(
    database_url: str, next_release: pytest.MonkeyPatch
) -> None:
    """What the release before wrote and read in SQL works before, during and after the migrations that came since."""
    head = schema._script().get_revision("made_up").down_revision
    before = schema._script().get_revision(str(head)).down_revision or head
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        schema.migrate(database_url, target="base")
        schema.migrate(database_url, target=str(before))
        cursor = await connection.execute(
            "INSERT INTO collab_sessions (created_at, last_active) VALUES (now(), now()) RETURNING id"
        )
        (session_id,) = await cursor.fetchone() or ()
        await connection.execute(
            "INSERT INTO collab_events (session_id, server_seq, payload_json, created_at, chain_hash)"
            " VALUES (%s, 1, '{}', now(), '')",
            (session_id,),
        )
        cursor = await connection.execute("SELECT * FROM collab_events")
        names = [column.name for column in cursor.description or () if column.name not in ("id", "server_seq")]
        known = sql.SQL(", ").join(map(sql.Identifier, names))
        append = sql.SQL(
            "INSERT INTO collab_events (server_seq, {known}) SELECT server_seq + 1, {known} FROM collab_events"
            " WHERE session_id = {session} ORDER BY server_seq DESC LIMIT 1"
        ).format(known=known, session=session_id)
        migration = asyncio.create_task(asyncio.to_thread(schema.migrate, database_url))
        appended = 1
        while not migration.done() or appended < 100:
            await connection.execute(append)
            appended += 1
        assert (await migration)[1] == "made_up"
        cursor = await connection.execute(sql.SQL("SELECT server_seq, {} FROM collab_events").format(known))
        assert sorted(row[0] for row in await cursor.fetchall()) == list(range(1, appended + 1))


def test_a_lock_that_is_never_free_is_told(
    database_url: str, next_release: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that gets no lock gives up and has changed nothing; run again, it works."""
    monkeypatch.setattr(schema, "_ATTEMPTS", 2)
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(schema, "_LOCK_PAUSE", 0.05)
    head = schema._script().get_revision("made_up").down_revision
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT count(*) FROM collab_events")
        with pytest.raises(LockTimeout):
            schema.migrate(database_url)
    assert schema.migrate(database_url) == (head, "made_up")
