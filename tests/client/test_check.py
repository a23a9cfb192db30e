"""Checking a log that one holds: the real one is accepted, and whatever was done to it is found."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from collab_service.client import BrokenLog, CollabClient, Event, LogCheck, NewEvent
from tests.client.test_values import EVERY_FIELD


@pytest.fixture
async def log(client: CollabClient) -> AsyncIterator[list[Event]]:
    """A session's events, of every kind."""
    session, _ = await client.create_session()
    for event in EVERY_FIELD:
        await client.append(session.id, event)
    await client.append_batch(session.id, [NewEvent(client_seq=n) for n in range(5)])
    yield [event async for event in client.read(session.id)]


def check(events: list[Event]) -> LogCheck:
    """Take all events."""
    log_check = LogCheck(events[0].session_id)
    for event in events:
        log_check.add(event)
    return log_check


async def test_the_log_as_it_is(client: CollabClient, log: list[Event]) -> None:
    """What the service stores is accepted, and leads to the chain hash that the session has, also from the start."""
    checked = check(log)
    session = await client.get_session(log[0].session_id)
    assert (checked.last_server_seq, checked.chain_hash) == (session.last_server_seq, session.chain_hash)
    new, _ = await client.create_session()
    assert (LogCheck(new.id).last_server_seq, LogCheck(new.id).chain_hash) == (0, new.chain_hash)


def without(events: list[Event], place: int) -> list[Event]:
    """Take one event out."""
    return events[:place] + events[place + 1 :]


def renumbered(events: list[Event]) -> list[Event]:
    """Take one event out and hide that."""
    kept = without(events, 2)
    return [replace(event, server_seq=number) for number, event in enumerate(kept, 1)]


def swapped(events: list[Event]) -> list[Event]:
    """Swap two events."""
    return [*events[:3], events[4], events[3], *events[5:]]


def with_contents_swapped(events: list[Event]) -> list[Event]:
    """Swap what two events say."""
    one, other = events[3], events[4]
    return [
        *events[:3],
        replace(one, payload=other.payload, type=other.type),
        replace(other, payload=one.payload, type=one.type),
        *events[5:],
    ]


def changed(place: int, **fields: object) -> Callable[[list[Event]], list[Event]]:
    """Return a function that changes one event."""

    def change(events: list[Event]) -> list[Event]:
        return [*events[:place], replace(events[place], **fields), *events[place + 1 :]]  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("tamper", "place", "message"),
    [
        (changed(1, payload="{}"), 1, "chain breaks at event 2"),
        (changed(0, payload=b"{}"), 0, "chain breaks at event 1"),
        (changed(3, payload=b"\0"), 3, "chain breaks"),
        (changed(2, actor_id="zoë"), 2, "chain breaks"),
        (changed(2, actor_id=None), 2, "chain breaks"),
        (changed(2, client_seq=1), 2, "chain breaks"),
        (changed(2, type=""), 2, "chain breaks"),
        (changed(3, hash=None), 3, "chain breaks"),
        (changed(2, signature=b"forged"), 2, "chain breaks"),
        (changed(2, idempotency_key="other"), 2, "chain breaks"),
        (changed(4, chain_hash=bytes(32)), 4, "chain breaks"),
        (changed(10, payload='{"last": true}'), 10, "chain breaks"),
        (changed(4, created_at=datetime(2100, 1, 1, tzinfo=UTC)), 4, "chain breaks"),
        (changed(4, created_at=datetime(2000, 1, 1, tzinfo=UTC)), 4, "event 5 is from before"),
        (changed(0, created_at=datetime(1960, 1, 1, tzinfo=UTC)), 0, "event 1 is from before"),
        (changed(4, session_id=2**62), 4, "event 5 is of session 4611686018427387904"),
        (changed(4, server_seq=4), 4, "after event 4 comes event 4"),
        (lambda events: without(events, 0), 0, "after event 0 comes event 2"),
        (lambda events: without(events, 5), 5, "after event 5 comes event 7"),
        (lambda events: [*events[:5], *events[4:]], 5, "after event 5 comes event 5"),
        (renumbered, 2, "chain breaks at event 3"),
        (swapped, 3, "after event 3 comes event 5"),
        (with_contents_swapped, 3, "chain breaks at event 4"),
    ],
)
async def test_a_log_that_was_changed(
    log: list[Event], tamper: Callable[[list[Event]], list[Event]], place: int, message: str
) -> None:
    """It is refused at the first event that is not what was stored, and a sentence says which and why."""
    log_check = LogCheck(log[0].session_id)
    tampered = tamper(log)
    for event in tampered[:place]:
        log_check.add(event)
    before = (log_check.last_server_seq, log_check.chain_hash)
    with pytest.raises(BrokenLog, match=message):
        log_check.add(tampered[place])
    assert (log_check.last_server_seq, log_check.chain_hash) == before


async def test_times_enter_exactly(log: list[Event]) -> None:
    """A microsecond makes a difference."""
    last = len(log) - 1
    late = changed(last, created_at=log[last].created_at + timedelta(microseconds=1))
    with pytest.raises(BrokenLog, match="chain breaks"):
        check(late(log))


async def test_events_of_another_session(client: CollabClient, log: list[Event]) -> None:
    """An event of another session is refused, also with this session's id on it."""
    other, _ = await client.create_session()
    event = (await client.append(other.id, EVERY_FIELD[0])).event
    log_check = LogCheck(log[0].session_id)
    with pytest.raises(BrokenLog, match=f"event 1 is of session {other.id}"):
        log_check.add(event)
    with pytest.raises(BrokenLog, match="chain breaks at event 1"):
        log_check.add(replace(event, session_id=log[0].session_id))
    log_check.add(log[0])


async def test_the_end_is_told_by_the_session(client: CollabClient, log: list[Event]) -> None:
    """That events are missing at the end shows in the number and the hash, which are the session's no more."""
    checked = check(log[:-1])
    session = await client.get_session(log[0].session_id)
    assert checked.last_server_seq == session.last_server_seq - 1
    assert checked.chain_hash != session.chain_hash
