"""Appending by group commit: gap-free numbers under any concurrency, and one caller's trouble is nobody else's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from collab_service.config import Config
from collab_service.log import sequencer
from collab_service.log.decide import Appended, AppendRequest
from collab_service.log.queue import Succession
from collab_service.log.service import LogService
from collab_service.model import NewEvent, QueueLimits
from collab_service.model.errors import (
    CommitOutcomeUnknown,
    IdempotencyKeyReused,
    LockTimeout,
    Overloaded,
    ServerSeqConflict,
    SessionNotFound,
    ShuttingDown,
)
from tests.log.conftest import StartService
from tests.log.logs import append, new_session, read_all, read_checked, session_with_known_head, unseen
from tests.proxy import INSERTING, INSERTING_BEHIND_HEADS, PostgresProxy
from tests.waiting import until


def event(number: int, key: str | None = None) -> NewEvent:
    """Return an event that can be told from others."""
    return NewEvent(actor_id=f"a{number}", client_seq=number, payload=f'{{"n":{number}}}', idempotency_key=key)


@asynccontextmanager
async def holding(url: str, session_id: int) -> AsyncIterator[None]:
    """Hold a session's row as somebody else's transaction does."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        yield


async def is_waiting_for_lock(url: str) -> bool:
    """Tell whether a connection waits for a row."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        row = await cursor.fetchone()
        return row is not None and row[0] > 0


@pytest.fixture
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for sessions that others hold for 2 s, a little at a time."""
    monkeypatch.setattr(sequencer, "_LOCK_WAIT", 2.0)
    monkeypatch.setattr(sequencer, "_LOCK_TURN", 0.05)


async def test_numbers_are_gap_free_under_concurrency(start_service: StartService) -> None:
    """Many writers on few sessions through two processes: 1, 2, 3 … in each, every acknowledgement true."""
    services = [start_service(), start_service()]
    ids = [await new_session(services[0]) for _ in range(3)]
    acknowledged: dict[tuple[int, int], NewEvent] = {}

    async def write(writer: int) -> None:
        for turn in range(15):
            session_id = ids[(writer + turn) % 3]
            batch = [event(writer * 1000 + turn * 10 + i) for i in range(1 + writer % 3)]
            appended = await append(services[writer % 2], session_id, *batch)
            for stored, sent in zip(appended.events, batch, strict=True):
                assert stored.content == sent
                acknowledged[session_id, stored.server_seq] = sent

    await asyncio.gather(*(write(writer) for writer in range(30)))
    for session_id in ids:
        stored = await read_checked(services[0], session_id)
        assert {e.server_seq: e.content for e in stored} == {
            seq: sent for (session, seq), sent in acknowledged.items() if session == session_id
        }


async def test_batches_are_neighbours(service: LogService) -> None:
    """The events of a batch have neighbouring numbers and share their time, whoever else writes."""
    session_id = await new_session(service)
    batches = await asyncio.gather(*(append(service, session_id, *map(event, range(n))) for n in (1, 7, 3, 40, 2)))
    for appended in batches:
        first = appended.events[0]
        assert [e.server_seq for e in appended.events] == list(
            range(first.server_seq, first.server_seq + len(appended.events))
        )
        assert {e.created_at for e in appended.events} == {first.created_at}
    assert len(await read_checked(service, session_id)) == 53


async def test_ids_rise_with_the_numbers(start_service: StartService) -> None:
    """Within a session the ids of events rise with their numbers, also when two processes write."""
    services = [start_service(), start_service()]
    session_id = await new_session(services[0])
    await asyncio.gather(*(append(services[n % 2], session_id, event(n)) for n in range(60)))
    ids = [e.id for e in await read_checked(services[0], session_id)]
    assert ids == sorted(ids)
    assert ids[0] >= 1


async def test_answers_are_for_each_request_alone(service: LogService) -> None:
    """In one transaction: unknown session, conflict, reused key and good ones; each gets its own answer."""
    session_id = await new_session(service)
    await append(service, session_id, event(1, "k"))
    results = await asyncio.gather(
        append(service, session_id, event(2)),
        append(service, 999_999, event(3)),
        append(service, session_id, event(4), expected=77),
        append(service, session_id, event(5, "k")),
        append(service, session_id, event(1, "k")),
        append(service, session_id, event(6), event(7)),
        return_exceptions=True,
    )
    good, unknown, conflict, reused, replay, batch = results
    assert isinstance(unknown, SessionNotFound)
    assert isinstance(conflict, ServerSeqConflict)
    assert isinstance(reused, IdempotencyKeyReused)
    assert isinstance(good, Appended) and isinstance(replay, Appended) and isinstance(batch, Appended)
    assert (replay.replayed, replay.events[0].server_seq) == (True, 1)
    assert [e.content for e in await read_checked(service, session_id)] == [event(1, "k"), event(2), event(6), event(7)]


async def test_conditions_never_both_succeed(start_service: StartService) -> None:
    """Of many appends that expect the same last number, exactly one is stored."""
    services = [start_service(), start_service()]
    session_id = await new_session(services[0])
    for head in range(5):
        tries = (append(services[n % 2], session_id, event(n), expected=head) for n in range(10))
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(result, Appended) for result in results) == 1
        assert all(isinstance(result, Appended | ServerSeqConflict) for result in results)
    assert len(await read_checked(services[0], session_id)) == 5


async def test_the_same_key_at_once_is_stored_once(start_service: StartService) -> None:
    """A retry that races with its original, in the same process or another, finds it."""
    services = [start_service(), start_service()]
    session_id = await new_session(services[0])
    results = await asyncio.gather(*(append(services[n % 2], session_id, event(1, "k")) for n in range(20)))
    assert {result.events[0] for result in results} == {(await read_checked(services[0], session_id))[0]}
    assert sum(not result.replayed for result in results) == 1


async def test_replays_of_batches(service: LogService) -> None:
    """One key makes a batch safe to retry; a batch that differs from what is stored there is refused, whole."""
    session_id = await new_session(service)
    batch = [event(1, "k1"), event(2), event(3, "k3")]
    first = await append(service, session_id, *batch)
    again = await append(service, session_id, *batch, expected=0)
    assert (again.events, again.replayed) == (first.events, True)
    await append(service, session_id, event(4))
    assert (await append(service, session_id, event(3, "k3"), event(4))).replayed
    for wrong, known in (
        ([event(1, "k1"), event(9)], "0"),
        ([event(9), event(1, "k1")], "1"),
        ([event(3, "k3"), event(4), event(5)], "0"),
        ([event(8, "new"), event(1, "k1"), event(3, "k3")], "1,2"),
    ):
        with pytest.raises(IdempotencyKeyReused) as caught:
            await append(service, session_id, *wrong)
        assert caught.value.metadata["known_indexes"] == known
    assert len(await read_checked(service, session_id)) == 4


async def test_a_poisoned_request_takes_no_other_down(service: LogService) -> None:
    """A request that the database refuses fails alone; those that shared its transaction are stored."""
    session_id = await new_session(service)
    poison = NewEvent(actor_id="NUL \0 got past validation")
    results = await asyncio.gather(
        *(append(service, session_id, poison if n == 3 else event(n)) for n in range(8)), return_exceptions=True
    )
    assert isinstance(results[3], psycopg.DataError)
    assert sum(isinstance(result, Appended) for result in results) == 7
    assert len(await read_checked(service, session_id)) == 7


async def test_a_session_that_somebody_holds_does_not_stall_the_others(service: LogService, database_url: str) -> None:
    """Appends to a locked session wait for it, in order, while others go on."""
    held, free = await new_session(service), await new_session(service)
    async with holding(database_url, held):
        waiting = [asyncio.create_task(append(service, held, event(n))) for n in range(3)]
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        waiting += [asyncio.create_task(append(service, held, event(n))) for n in range(3, 6)]
        for n in range(5):
            await append(service, free, event(n))
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert [e.content for e in await read_checked(service, held)] == [event(n) for n in range(6)]
    assert len(await read_checked(service, free)) == 5


async def test_callers_who_have_given_up_are_not_written(service: LogService, database_url: str) -> None:
    """A caller who leaves while waiting, queued or for the lock, leaves nothing behind."""
    session_id = await new_session(service)
    async with holding(database_url, session_id):
        leaving = asyncio.create_task(append(service, session_id, event(1)))
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        staying = asyncio.create_task(append(service, session_id, event(2)))
        leaving_too = asyncio.create_task(append(service, session_id, event(3)))
        await asyncio.sleep(0)
        for task in (leaving, leaving_too):
            task.cancel()
        await asyncio.wait((leaving, leaving_too))
    await staying
    assert [e.content for e in await read_checked(service, session_id)] == [event(2)]


async def test_a_full_queue_refuses_instead_of_growing(start_service: StartService, database_url: str) -> None:
    """With as much waiting or under way as is allowed, the next append is refused at once and not stored."""
    service = start_service(queue=QueueLimits(requests=20, session_requests=5))
    session_id = await new_session(service)
    async with holding(database_url, session_id):
        tasks = [asyncio.create_task(append(service, session_id, event(0)))]
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        tasks += [asyncio.create_task(append(service, session_id, event(n))) for n in range(1, 5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await append(service, session_id, event(99))
        other = await new_session(service)
        await append(service, other, event(1))
    await asyncio.gather(*tasks)
    assert [e.content for e in await read_checked(service, session_id)] == [event(n) for n in range(5)]


async def test_stopping_writes_what_waits(start_service: StartService, database_url: str) -> None:
    """What was accepted before the stop is stored and acknowledged; what comes after it is refused."""
    service, reader = start_service(), start_service()
    session_id = await new_session(service)
    tasks = [asyncio.create_task(append(service, session_id, event(n))) for n in range(50)]
    await asyncio.sleep(0)
    await service.stop(10)
    with pytest.raises(ShuttingDown):
        await append(service, session_id, event(99))
    appended = await asyncio.gather(*tasks)
    assert len(appended) == len(await read_checked(reader, session_id)) == 50


async def test_what_waits_for_room_when_it_stops(start_service: StartService, database_url: str) -> None:
    """What has no room yet when the service stops is told, and does not come into a queue that nobody writes."""
    service = start_service(queue=QueueLimits(session_requests=1, requests=2))
    session_id = await new_session(service)
    async with holding(database_url, session_id):
        first = asyncio.create_task(append(service, session_id, event(1)))
        await until(lambda: is_waiting_for_lock(database_url), "the append")
        request = AppendRequest(session_id, [event(2)], 2)
        second = asyncio.create_task(service._sequencer.submit(request, Succession()))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(service._sequencer.stop(5))
        await asyncio.sleep(0)
        assert not second.done()
    await stopping
    assert (await first).events[0].server_seq == 1
    with pytest.raises(ShuttingDown):
        await second
    assert len(service._sequencer._queue) == 0


async def test_deleting_while_appending(service: LogService) -> None:
    """Every append before the deletion is acknowledged, every later one is told that the session is gone."""
    session_id = await new_session(service)

    async def write() -> list[int]:
        numbers = []
        while True:
            try:
                numbers.append((await append(service, session_id, event(1))).events[0].server_seq)
            except SessionNotFound:
                return numbers

    writers = [asyncio.create_task(write()) for _ in range(5)]

    async def has_some() -> bool:
        return (await service.get_session(session_id)).last_server_seq >= 20

    await until(has_some, "20 events")
    await service.delete_session(session_id)
    numbers = [number for written in await asyncio.gather(*writers) for number in written]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    with pytest.raises(SessionNotFound):
        await read_all(service, session_id)


async def test_a_lost_connection_before_the_commit_is_not_noticed(service: LogService, database_url: str) -> None:
    """Backends that are terminated while idle or waiting for a lock cost no caller anything."""
    session_id = await new_session(service)
    await append(service, session_id, event(1))

    async def terminate() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND application_name = 'collab-service'"
            )

    await terminate()
    await append(service, session_id, event(2))
    async with holding(database_url, session_id):
        waiting = asyncio.create_task(append(service, session_id, event(3)))
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        await terminate()
    await waiting
    assert [e.content for e in await read_checked(service, session_id)] == [event(n) for n in (1, 2, 3)]


async def test_a_poisoned_request_and_a_session_that_is_taken_meanwhile(service: LogService, database_url: str) -> None:
    """When another writer gets the row between the shared transaction and the single ones, nobody is forgotten."""
    session_id, other = await new_session(service), await new_session(service)
    poison = NewEvent(actor_id="NUL \0 got past validation")
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        tasks = [asyncio.create_task(append(service, session_id, poison if n == 3 else event(n))) for n in range(8)]
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")

        async def take_turns() -> None:
            async with await psycopg.AsyncConnection.connect(database_url) as rival:
                for _ in range(10):
                    await rival.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
                    await rival.execute("SELECT pg_sleep(0.01)")
                    await rival.rollback()

        rivals = [asyncio.create_task(take_turns()) for _ in range(3)]
        await connection.rollback()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*rivals)
    assert isinstance(results[3], psycopg.DataError)
    assert sum(isinstance(result, Appended) for result in results) == 7
    assert [e.content for e in await read_checked(service, session_id)] == [event(n) for n in range(8) if n != 3]
    await append(service, other, event(1))


async def test_what_comes_while_a_poisoned_batch_is_tried_again(
    proxy: PostgresProxy, start_service: StartService, database_url: str
) -> None:
    """When somebody takes the row meanwhile, what was put off stays before what has come after it."""
    service = start_service(proxy.url)
    session_id, other = await new_session(service), await new_session(service)
    later: list[asyncio.Task[Appended]] = []
    async with await psycopg.AsyncConnection.connect(database_url) as rival:

        async def take_the_row() -> None:
            await rival.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))

        async def meanwhile() -> None:
            later.append(asyncio.create_task(append(service, session_id, event(3))))
            rivals.append(asyncio.create_task(take_the_row()))
            await until(lambda: is_waiting_for_lock(database_url), "somebody who waits for the row")

        rivals: list[asyncio.Task[None]] = []
        proxy.before_anybody_says(INSERTING, meanwhile)
        poison = asyncio.create_task(append(service, other, NewEvent(actor_id="NUL \0 got past validation")))
        tasks = [asyncio.create_task(append(service, session_id, event(n))) for n in (1, 2)]
        with pytest.raises(psycopg.DataError):
            await poison
        await rivals[0]
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        await rival.rollback()
        await asyncio.gather(*tasks, *later)
    assert [e.content for e in await read_checked(service, session_id)] == [event(1), event(2), event(3)]


async def test_many_events_come_while_a_poisoned_batch_is_tried_again(
    proxy: PostgresProxy, start_service: StartService
) -> None:
    """What is taken ahead meanwhile is written, too: nobody waits for ever."""
    service = start_service(proxy.url)
    ids = [await session_with_known_head(service) for _ in range(5)]
    many = [event(n) for n in range(100)]
    later: list[asyncio.Task[Appended]] = []

    async def another_comes() -> None:
        if len(later) < 4:
            later.append(asyncio.create_task(append(service, ids[3 + len(later) % 2], *many)))
            for _ in range(10):  # until it is taken
                await asyncio.sleep(0)
            proxy.before_anybody_says(INSERTING_BEHIND_HEADS, another_comes)

    async def come() -> bool:
        return len(later) == 4

    proxy.before_anybody_says(INSERTING_BEHIND_HEADS, another_comes)
    poison = asyncio.create_task(append(service, ids[0], NewEvent(actor_id="NUL \0 got past validation")))
    tasks = [asyncio.create_task(append(service, session_id, *many)) for session_id in ids[1:3]]
    with pytest.raises(psycopg.DataError):
        await poison
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)
        await until(come, "all that comes meanwhile")
        await asyncio.gather(*later)
    lengths = [len(await read_checked(service, session_id)) for session_id in ids]
    assert lengths == [2, 102, 102, 202, 202]


async def test_stopping_while_a_session_is_held(start_service: StartService, database_url: str) -> None:
    """Who waits for a session that somebody else has locked is told when the grace is over, and nothing is stored."""
    service, reader = start_service(), start_service()
    session_id = await new_session(service)
    async with holding(database_url, session_id):
        task = asyncio.create_task(append(service, session_id, event(1)))
        await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        await service.stop(0.1)
        async with asyncio.timeout(10):
            with pytest.raises((ShuttingDown, CommitOutcomeUnknown)):
                await task
    assert await read_all(reader, session_id) == []


async def test_a_long_line_for_a_stuck_session(service: LogService, database_url: str, quick_locks: None) -> None:
    """Those at its end are told together with those at its front: each has waited long enough."""
    session_id = await new_session(service)
    many = [event(n) for n in range(1_000)]
    async with holding(database_url, session_id):
        tasks = [asyncio.create_task(append(service, session_id, *many)) for _ in range(10)]
        async with asyncio.timeout(8):  # each transaction's worth of them by turns would take 20 s
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {LockTimeout}


async def test_a_replay_over_events_that_have_just_come(service: LogService) -> None:
    """A batch that equals what is stored is a replay, also when some of it was stored a moment before."""
    session_id = await new_session(service)
    await append(service, session_id, event(1))
    first, both = await asyncio.gather(
        append(service, session_id, event(2, "k")), append(service, session_id, event(1), event(2, "k"))
    )
    assert (first.replayed, both.replayed) == (False, True)
    assert [e.server_seq for e in both.events] == [1, 2]
    assert len(await read_checked(service, session_id)) == 2


async def test_stuck_sessions_do_not_keep_a_held_one_waiting(service: LogService, database_url: str) -> None:
    """However many sessions are stuck, another that is held for a moment is served once it is free."""
    ids = [await new_session(service) for _ in range(8)]
    async with await psycopg.AsyncConnection.connect(database_url) as stuck:
        await stuck.execute("SELECT id FROM collab_sessions WHERE id = ANY(%s) FOR UPDATE", (ids[:7],))
        waiting = [asyncio.create_task(append(service, session_id, event(1))) for session_id in ids[:7]]
        async with holding(database_url, ids[7]):
            free = asyncio.create_task(append(service, ids[7], event(1)))
            await until(lambda: is_waiting_for_lock(database_url), "waiting for the lock")
        async with asyncio.timeout(5):
            await free
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)


async def test_trouble_after_the_commit_is_not_tried_again(
    database_url: str, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed is stored once, whatever breaks in telling so; the process ends, and the outcome is unknown."""
    died = asyncio.Event()
    service = LogService(Config(data_dir=Path("/nonexistent")), database_url, metrics=unseen(), on_death=died.set)
    service.start()
    session_id = await new_session(service)

    def break_down(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service._tails, "feed", break_down)
    results = await asyncio.gather(*(append(service, session_id, event(n)) for n in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [CommitOutcomeUnknown, CommitOutcomeUnknown]
    await died.wait()
    await service.stop(0)
    assert [e.content for e in await read_checked(start_service(), session_id)] == [event(0), event(1)]
