"""A connection that is lost during a commit: what is acknowledged is stored, once, and nothing is made up."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from collab_service.log import sequencer
from collab_service.log.service import LogService
from collab_service.model import NewEvent
from collab_service.model.errors import CommitOutcomeUnknown
from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory
from collab_service.storage.embedded.accounts import postgres_account
from tests.log.conftest import StartService
from tests.log.logs import (
    append,
    let_inserts_go,
    new_session,
    read_checked,
    session_with_known_head,
    stop_inserts,
)
from tests.proxy import COMMITTED, INSERTED, INSERTING, INSERTING_BEHIND_HEADS, LOCKING, PostgresProxy
from tests.waiting import until

_SLOW_FIRST_COMMIT = """
CREATE SEQUENCE commits;
CREATE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('commits') = 1 AND current_setting('collab.quick', true) IS NULL THEN
            PERFORM pg_sleep(60);
        END IF;
        RETURN NULL;
    END
$$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON collab_events DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slow_commit()
"""
"""A deferred trigger runs within COMMIT; this one is slow the first time. (A crash takes back what a sequence gave.)"""


@pytest.mark.parametrize("took_place", [True, False])
@pytest.mark.parametrize(
    ("before", "inserting", "committed"),
    [(1, INSERTING, COMMITTED), (2, INSERTING_BEHIND_HEADS, INSERTED)],
    ids=["in two round trips", "in one"],
)
async def test_the_outcome_is_found_out(
    proxy: PostgresProxy, start_service: StartService, took_place: bool, before: int, inserting: bytes, committed: bytes
) -> None:
    """Whether the lost commit took place or not: every caller gets a true OK, and each event is stored once."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await new_session(service)
    for _ in range(before):
        await append(service, session_id, NewEvent(type="before"))
    if took_place:
        proxy.cut_before_server_says(committed)
    else:
        proxy.cut_before_client_says(inserting)
    sent = [NewEvent(client_seq=n) for n in range(10)]
    appended = await asyncio.gather(*(append(service, session_id, event) for event in sent))
    assert proxy.cuts == 1
    stored = await read_checked(reader, session_id)
    assert sorted(e.content.client_seq or 0 for e in stored[before:]) == list(range(10))
    assert {a.events[0] for a in appended} == set(stored[before:])
    assert not any(a.replayed for a in appended)
    assert (await append(service, session_id, NewEvent(type="next"))).events[0].server_seq == before + 11


async def test_a_statement_that_comes_late(
    proxy: PostgresProxy, start_service: StartService, database_url: str
) -> None:
    """A statement that was on its way when the connection was lost may yet be carried out: nobody is told "none"."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await session_with_known_head(service)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE full_disk (); INSERT INTO full_disk DEFAULT VALUES")
        await connection.execute(
            "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF EXISTS (SELECT FROM full_disk) THEN RAISE disk_full; END IF; RETURN NEW; END $$"
        )
        await connection.execute(
            "CREATE TRIGGER no_space BEFORE INSERT ON collab_events FOR EACH ROW EXECUTE FUNCTION no_space()"
        )
        proxy.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
        # It is looked up, it is not there, and the second attempt fails.
        with pytest.raises(CommitOutcomeUnknown):
            await append(service, session_id, NewEvent(type="late"))
        assert len(await read_checked(reader, session_id)) == 2
        await connection.execute("DELETE FROM full_disk")
    proxy.send_what_is_late()

    async def has_come() -> bool:
        return len(await read_checked(reader, session_id)) == 3

    await until(has_come, "the late event")
    assert (await append(service, session_id, NewEvent(type="next"))).events[0].server_seq == 4


async def test_a_statement_that_comes_too_late(proxy: PostgresProxy, start_service: StartService) -> None:
    """Once the second attempt has succeeded, the first one finds the numbers taken: the event is stored once."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await session_with_known_head(service)
    proxy.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
    assert (await append(service, session_id, NewEvent(type="once"))).events[0].server_seq == 3
    proxy.send_what_is_late()
    assert (await append(service, session_id, NewEvent(type="next"))).events[0].server_seq == 4
    assert [e.content.type for e in await read_checked(reader, session_id)] == ["before", "before", "once", "next"]


@pytest.mark.parametrize("slowly", [False, True], ids=["before it", "while it waits"])
@pytest.mark.parametrize(
    ("key", "expected"), [(None, None), (None, 2), ("k", None)], ids=["plain", "on a condition", "with a key"]
)
async def test_a_statement_that_comes_late_but_before_the_second_attempt(
    proxy: PostgresProxy,
    start_service: StartService,
    database_url: str,
    slowly: bool,
    key: str | None,
    expected: int | None,
) -> None:
    """What comes late is the answer, also when it comes at the last moment: each event is stored once."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await session_with_known_head(service)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await stop_inserts(connection)

        async def waits_for(kind: str) -> bool:
            waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = %s"
            return await (await connection.execute(waiting, (kind,))).fetchone() is not None

        async def arrive() -> None:
            proxy.send_what_is_late()
            await until(lambda: waits_for("advisory"), "the late statement")
            if not slowly:
                await let_inserts_go(connection)
                await until(has_come, "the late event")

        async def has_come() -> bool:
            return len(await read_checked(reader, session_id)) == 3

        proxy.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
        proxy.before_anybody_says(LOCKING, arrive)
        sent = NewEvent(type="once", idempotency_key=key)
        appending = asyncio.create_task(append(service, session_id, sent, expected=expected))
        if slowly:
            await until(lambda: waits_for("transactionid"), "the second attempt")
            await let_inserts_go(connection)
        appended = await appending
    assert proxy.cuts == 1
    assert not appended.replayed
    assert (await read_checked(reader, session_id))[2:] == appended.events


@pytest.mark.parametrize("expected", [None, 2], ids=["plain", "on a condition"])
async def test_a_statement_that_comes_late_between_two_transactions(
    proxy: PostgresProxy, start_service: StartService, expected: int | None
) -> None:
    """When a transaction ends that has looked for it, it can no longer come: each event is stored once."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await session_with_known_head(service)
    proxy.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
    proxy.before_anybody_says(COMMITTED, proxy.send_what_is_late_and_wait)
    appended = await append(service, session_id, NewEvent(type="once"), expected=expected)
    assert proxy.cuts == 1
    assert (await read_checked(reader, session_id))[2:] == appended.events


async def test_a_refusal_of_what_may_still_come(proxy: PostgresProxy, start_service: StartService) -> None:
    """What a later attempt would refuse may still be stored by an earlier one: nobody is told "none"."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await session_with_known_head(service)
    first = asyncio.create_task(append(service, session_id, NewEvent(type="first")))
    second = asyncio.create_task(append(service, session_id, NewEvent(type="second"), expected=3))

    async def leave() -> None:
        first.cancel()

    proxy.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
    proxy.before_anybody_says(LOCKING, leave)
    with pytest.raises(CommitOutcomeUnknown):
        await second
    proxy.send_what_is_late()

    async def has_come() -> bool:
        return len(await read_checked(reader, session_id)) == 4

    await until(has_come, "the late events")


async def test_trouble_while_finding_out_is_no_answer(
    proxy: PostgresProxy, start_service: StartService, database_url: str
) -> None:
    """An unexpected error while the outcome is looked up makes nobody guess: each event is stored once."""
    service, reader = start_service(proxy.url), start_service()
    session_id = await new_session(service)
    await append(service, session_id, NewEvent(type="first"))
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        # The commit that gets lost also makes new connections look for the tables elsewhere, which nothing expects.
        await connection.execute(
            "CREATE FUNCTION mislay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " EXECUTE format('ALTER DATABASE %I SET search_path = nowhere', current_database()); RETURN NULL; END $$"
        )
        await connection.execute(
            "CREATE CONSTRAINT TRIGGER mislay AFTER INSERT ON collab_events DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION mislay()"
        )
        proxy.cut_before_server_says(COMMITTED)
        tasks = [asyncio.create_task(append(service, session_id, NewEvent(client_seq=n))) for n in range(4)]

        async def has_failed_to_look() -> bool:
            cursor = await connection.execute(
                "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
            )
            row = await cursor.fetchone()
            return proxy.cuts == 1 and row is not None and row[0] > before

        cursor = await connection.execute(
            "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        row = await cursor.fetchone()
        before = row[0] if row else 0
        await until(has_failed_to_look, "a look that fails")
        assert not any(task.done() for task in tasks)
        await connection.execute("DROP TRIGGER mislay ON collab_events")
        await connection.execute(f"ALTER DATABASE {connection.info.dbname} RESET search_path")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        appended = await asyncio.gather(*tasks)
    stored = await read_checked(reader, session_id)
    assert sorted(e.content.client_seq or 0 for e in stored[1:]) == [0, 1, 2, 3]
    assert {a.events[0] for a in appended} == set(stored[1:])


async def test_a_replay_in_doubt_is_looked_up_again(proxy: PostgresProxy, start_service: StartService) -> None:
    """A lost commit that stored nothing new leaves nothing to find out."""
    service = start_service(proxy.url)
    session_id = await new_session(service)
    first = await append(service, session_id, NewEvent(idempotency_key="k"))
    proxy.cut_before_server_says(COMMITTED)
    again = await append(service, session_id, NewEvent(idempotency_key="k"))
    assert (proxy.cuts, again.replayed, again.events) == (1, True, first.events)


async def test_the_numbers_in_doubt_are_taken_by_nobody_else(proxy: PostgresProxy, start_service: StartService) -> None:
    """While one process finds out what became of its commit, others go on; the log stays whole."""
    service, other = start_service(proxy.url), start_service()
    session_id = await new_session(service)
    proxy.cut_before_client_says(INSERTING)
    results = await asyncio.gather(
        *(append(service if n % 2 else other, session_id, NewEvent(client_seq=n)) for n in range(40))
    )
    stored = await read_checked(other, session_id)
    assert len(stored) == 40
    assert {r.events[0] for r in results} == set(stored)


async def test_unknown_only_when_the_database_stays_away(
    proxy: PostgresProxy, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with the database away for long is the outcome unknown; a retry with the key then finds the event."""
    monkeypatch.setattr(sequencer, "_RESOLVE", 0.3)
    service, reader = start_service(proxy.url), start_service()
    session_id = await new_session(service)
    event = NewEvent(idempotency_key="k")
    proxy.cut_before_server_says(COMMITTED, stay_away=True)
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await append(service, session_id, event)
    assert caught.value.may_have_been_written
    proxy.come_back()
    again = await append(service, session_id, event)
    assert again.replayed
    assert await read_checked(reader, session_id) == again.events


async def test_terminated_in_the_middle_of_the_commit(start_service: StartService, database_url: str) -> None:
    """A backend that is terminated while it commits: the append is carried out again, once."""
    service = start_service()
    session_id = await new_session(service)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(_SLOW_FIRST_COMMIT)
        task = asyncio.create_task(append(service, session_id, NewEvent(type="a")))

        async def terminated() -> bool:
            cursor = await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event = 'PgSleep'"
            )
            return bool(await cursor.fetchall())

        await until(terminated, "the commit")
        appended = await task
    assert await read_checked(service, session_id) == appended.events


@pytest.mark.parametrize("before", [1, 2], ids=["in two round trips", "in one"])
async def test_the_database_crashes_in_the_middle_of_the_commit(
    start_service: StartService, directory: Path, before: int
) -> None:
    """A server that says goodbye with a warning, as in a crash, leaves nobody in doubt once it is back."""
    with own_cluster(directory) as (cluster, data):
        service = start_service(cluster.url)
        session_id = await new_session(service)
        for _ in range(before):
            await append(service, session_id, NewEvent(type="before"))
        async with await psycopg.AsyncConnection.connect(cluster.url, autocommit=True) as connection:
            await connection.execute(_SLOW_FIRST_COMMIT)
            task = asyncio.create_task(append(service, session_id, NewEvent(type="a")))

            async def is_committing() -> bool:
                cursor = await connection.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
                return await cursor.fetchone() is not None

            await until(is_committing, "the commit")
        os.kill(int((data.cluster / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        await until_stopped(cluster)
        await asyncio.to_thread(cluster.start, "collab.quick=on")
        appended = await task
        assert not appended.replayed
        assert [e.content.type for e in await read_checked(service, session_id)] == ["before"] * before + ["a"]


@contextmanager
def own_cluster(directory: Path) -> Iterator[tuple[Cluster, DataDirectory]]:
    """Run a PostgreSQL of the test's own, with our schema."""
    account = postgres_account()
    assert account is not None
    data = DataDirectory(directory / "data", account)
    cluster = Cluster(data)
    cluster.start()
    try:
        schema.migrate(cluster.url)
        yield cluster, data
    finally:
        cluster.stop()
        data.release()


async def until_stopped(cluster: Cluster) -> None:
    """Wait until no PostgreSQL runs there any more."""

    async def has_stopped() -> bool:
        return not cluster.is_running()

    await until(has_stopped, "the end of PostgreSQL")


@pytest.mark.parametrize(
    "write",
    [
        lambda service, session_id: append(service, session_id, NewEvent()),
        lambda service, _: new_session(service),
        lambda service, session_id: service.touch_session(session_id),
        lambda service, session_id: service.delete_session(session_id),
        lambda service, _: service.remove_user("ada"),
    ],
    ids=["append", "create", "touch", "delete", "remove user"],
)
async def test_a_commit_that_gave_up_waiting_for_a_standby_is_unknown(
    start_service: StartService, directory: Path, write: Callable[[LogService, int], Coroutine[Any, Any, object]]
) -> None:
    """Committed here but perhaps nowhere else is not acknowledged: a fail-over could lose it."""
    with own_cluster(directory) as (cluster, _):
        service = start_service(cluster.url)
        session, _ = await service.create_session(language_id=None, owner_id="ada", room=None)
        async with (
            await psycopg.AsyncConnection.connect(cluster.url, autocommit=True) as connection,
            await psycopg.AsyncConnection.connect(cluster.url, autocommit=True) as other,
        ):
            await connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nowhere'")
            await connection.execute("SELECT pg_reload_conf()")

            async def cancelled() -> bool:
                cursor = await connection.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                )
                return bool(await cursor.fetchall())

            probe: asyncio.Task[object] | None = None

            async def has_arrived() -> bool:
                nonlocal probe
                if probe is None or probe.done():  # commits succeed until then
                    probe = asyncio.create_task(other.execute("COMMENT ON SCHEMA public IS 'probe'"))
                return await cancelled()

            await until(has_arrived, "the setting")
            assert probe is not None
            await probe
            writing = asyncio.create_task(write(service, session.id))
            await until(cancelled, "waiting for the standby")
            with pytest.raises(CommitOutcomeUnknown):
                await writing
            await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await connection.execute("SELECT pg_reload_conf()")
