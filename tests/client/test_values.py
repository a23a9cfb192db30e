"""Values: what was given comes back to the byte, and what cannot be given is told."""

from datetime import UTC, datetime, timedelta

import pytest

from collab_service.client import CollabClient, Event, InvalidRequest, NewEvent
from collab_service.v1 import collab_service_pb2 as pb

MOST = 2**63 - 1

EVERY_FIELD = [
    NewEvent(),
    NewEvent('{\n "a" : 1e400, "a": 12345678901234567890, "\\u0000": "é😀\u2028" }'),
    NewEvent(
        b"\x00\xff" * 100,
        actor_id="Zoë",
        client_seq=MOST,
        type="ытип",
        hash="sha256:ü",
        signature=bytes(range(256)),
        idempotency_key="key/😀",
    ),
    NewEvent(b"", actor_id="a" * 255, client_seq=0, hash="", signature=b"\0" * 1024),
    NewEvent('{"a":"' + "é" * 524_280 + '"}', type="long"),
    NewEvent.of({"list": [1, 2.5, None, True, "\u202e", 10**30], "empty": {}}, type="edit"),
]


async def test_every_field_comes_back_as_given(client: CollabClient) -> None:
    """What the author gave is what is returned, stored and followed, to the byte."""
    session, _ = await client.create_session()
    appended = [await client.append(session.id, event, auto_key=False) for event in EVERY_FIELD]
    stored = [a.event for a in appended]
    assert [event.content() for event in stored] == EVERY_FIELD
    assert [event async for event in client.read(session.id)] == stored
    assert [event async for event in client.follow(session.id, limit=len(stored))] == stored
    assert [event.server_seq for event in stored] == list(range(1, len(stored) + 1))
    assert {event.session_id for event in stored} == {session.id}
    assert {event.created_at.tzinfo for event in stored} == {UTC}
    assert sorted({event.id for event in stored}) == [event.id for event in stored]
    after = await client.get_session(session.id)
    assert (after.last_server_seq, after.chain_hash) == (len(stored), stored[-1].chain_hash)
    batch = [event for event in EVERY_FIELD if event.idempotency_key is None]
    other, _ = await client.create_session()
    await client.append_batch(other.id, batch, auto_key=False)
    assert [event.content() async for event in client.read(other.id)] == batch


async def test_times_are_exact(client: CollabClient) -> None:
    """A time is the service's, to the microsecond."""
    session, _ = await client.create_session()
    appended = await client.append(session.id, NewEvent())
    request = pb.ListEventsRequest(session_id=session.id)
    async for message in client.stub.ListEvents(request):
        micros = message.events[0].create_time.ToMicroseconds()
    assert appended.event.created_at - datetime(1970, 1, 1, tzinfo=UTC) == timedelta(microseconds=micros)


def test_values_of_events() -> None:
    """`NewEvent.of` writes JSON that means its value, and refuses what has none; `value` reads it."""
    value = {"text": "é😀", "n": 10**30, "f": 0.1, "deep": [{"a": None}], "b": [True, False]}
    event = NewEvent.of(value, actor_id="ada")
    assert event.actor_id == "ada"
    assert isinstance(event.payload, str)
    assert "é😀" in event.payload
    assert stored(event).value() == value
    assert NewEvent.of({}) == NewEvent()
    itself: dict[str, object] = {}
    itself["itself"] = itself
    for wrong in ({"a": float("nan")}, {"a": [float("-inf")]}, itself):
        with pytest.raises(ValueError, match=r".*"):
            NewEvent.of(wrong)
    with pytest.raises(TypeError):
        NewEvent.of({"a": object()})
    with pytest.raises(ValueError, match="event 3 of session 7 is binary"):
        stored(NewEvent(b"{}")).value()


async def test_what_has_no_text_is_refused(client: CollabClient) -> None:
    """A lone surrogate is no text: it is told which field it is in, and nothing is sent."""
    session, _ = await client.create_session()
    with pytest.raises(InvalidRequest) as caught:
        await client.append(session.id, NewEvent.of({"a": "\ud800"}))
    assert [violation.field for violation in caught.value.violations] == ["event.json"]
    with pytest.raises(InvalidRequest) as caught:
        await client.append_batch(session.id, [NewEvent(), NewEvent(actor_id="\udfff")])
    assert [violation.field for violation in caught.value.violations] == ["events[1].actor_id"]
    assert (await client.get_session(session.id)).last_server_seq == 0


def stored(event: NewEvent) -> Event:
    """Return an event as if it were stored."""
    return Event(
        1,
        7,
        3,
        datetime.now(UTC),
        bytes(32),
        event.payload,
        event.actor_id,
        event.client_seq,
        event.type,
        event.hash,
        event.signature,
        event.idempotency_key,
    )
