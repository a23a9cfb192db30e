"""ListEvents without follow: ordered, unique, gap-free, resumable, bookmarkable."""

import threading

import grpc
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.rpc.calls import TIMEOUT, append, events, failure, new_session, read

COUNT = 12_000
"""More than one look through the table covers."""


@pytest.fixture(scope="module")
def session(stub: CollabServiceStub) -> int:
    """A session in which every thousandth event is `rare` and the rest is `edit` or has no type."""
    session_id = new_session(stub)
    for start in range(0, COUNT, 1000):
        batch = [
            pb.NewEvent(client_seq=start + n, type="rare" if n == 999 else "edit" if n % 2 else None)
            for n in range(1000)
        ]
        stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=batch))
    return session_id


def numbers(messages: list[pb.ListEventsResponse]) -> list[int]:
    """Return the numbers of all events."""
    return [event.server_seq for message in messages for event in message.events]


def test_everything_in_order_once(stub: CollabServiceStub, session: int) -> None:
    """Ordered, unique, gap-free; messages bounded; every bookmark is the last event delivered."""
    messages = read(stub, session)
    assert numbers(messages) == list(range(1, COUNT + 1))
    for message in messages:
        assert 0 < len(message.events) <= 500
        assert message.through_server_seq == message.events[-1].server_seq
        assert message.head_server_seq == COUNT


@pytest.mark.parametrize("since", [1, 499, 500, 501, COUNT - 1])
def test_resumable(stub: CollabServiceStub, session: int, since: int) -> None:
    """Reading goes on right after any number."""
    assert numbers(read(stub, session, since_server_seq=since)) == list(range(since + 1, COUNT + 1))


@pytest.mark.parametrize("limit", [1, 499, 500, 501, COUNT, COUNT + 1, 2**63 - 1])
def test_limit(stub: CollabServiceStub, session: int, limit: int) -> None:
    """A limit ends the stream; the bookmark is the last number delivered."""
    messages = read(stub, session, limit=limit)
    assert numbers(messages) == list(range(1, min(limit, COUNT) + 1))
    assert messages[-1].through_server_seq == min(limit, COUNT)


def test_types(stub: CollabServiceStub, session: int) -> None:
    """Only the types asked for come, and the last bookmark is the head all the same."""
    messages = read(stub, session, types=["rare"])
    assert numbers(messages) == list(range(1000, COUNT + 1, 1000))
    assert messages[-1].through_server_seq == COUNT
    bookmarks = [message.through_server_seq for message in messages]
    assert bookmarks == sorted(bookmarks)
    both = read(stub, session, types=["rare", "edit", "rare"])
    assert numbers(both) == [n for n in range(1, COUNT + 1) if n % 1000 == 0 or n % 2 == 0]
    limited = read(stub, session, types=["rare"], limit=2)
    assert (numbers(limited), limited[-1].through_server_seq) == ([1000, 2000], 2000)


def test_types_that_let_nothing_through(stub: CollabServiceStub, session: int) -> None:
    """Caught up is told also when a filter let nothing through."""
    messages = read(stub, session, types=["none of them"])
    assert numbers(messages) == []
    assert messages[-1].through_server_seq == messages[-1].head_server_seq == COUNT


def test_at_the_head(stub: CollabServiceStub, session: int) -> None:
    """An accepted call sends at least one message, also when there is nothing to read."""
    for message in (
        *read(stub, session, since_server_seq=COUNT),
        *read(stub, session, since_server_seq=COUNT, limit=3),
    ):
        assert (len(message.events), message.through_server_seq, message.head_server_seq) == (0, COUNT, COUNT)
    (empty,) = read(stub, new_session(stub))
    assert (len(empty.events), empty.through_server_seq, empty.head_server_seq) == (0, 0, 0)


def test_beyond_the_head(stub: CollabServiceStub, session: int) -> None:
    """A reader that is ahead of the log is told so."""
    failed = failure(lambda: read(stub, session, since_server_seq=COUNT + 1))
    assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "SERVER_SEQ_BEYOND_HEAD")
    assert failed.metadata == {"since": str(COUNT + 1), "head": str(COUNT), "side_effects": "none"}


def test_messages_are_bounded_by_bytes(stub: CollabServiceStub) -> None:
    """A message carries about 1 MiB; a larger event goes alone."""
    session_id = new_session(stub)
    sizes = [10, 900_000, 200_000, 1_048_576, 5, 5, 600_000, 600_000]
    for size in sizes:
        append(stub, session_id, binary=b"x" * size)
    found = [[len(event.binary) for event in message.events] for message in read(stub, session_id)]
    assert [size for message in found for size in message] == sizes
    assert all(sum(message) <= 1_048_576 or len(message) == 1 for message in found)
    assert len(found) < len(sizes)


def test_atomic(stub: CollabServiceStub) -> None:
    """The head is the end of an append, never the middle of a batch, while others write."""
    session_id = new_session(stub)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=[pb.NewEvent()] * 7))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            messages = read(stub, session_id)
            assert {message.head_server_seq % 7 for message in messages} == {0}
            assert len({message.head_server_seq for message in messages}) == 1
            assert numbers(messages) == list(range(1, messages[-1].head_server_seq + 1))
    finally:
        done.set()
        writer.join()


def test_deleted_while_reading(stub: CollabServiceStub) -> None:
    """A session that is deleted half-way ends the stream with NOT_FOUND, never with a gap or as if complete."""
    session_id = new_session(stub)
    for _ in range(30):
        append(stub, session_id, binary=b"x" * 500_000)
    stream = stub.ListEvents(pb.ListEventsRequest(session_id=session_id))
    got = [event.server_seq for event in next(stream).events]
    stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id))
    failed = failure(lambda: got.extend(e.server_seq for message in stream for e in message.events))
    assert failed.reason == "SESSION_NOT_FOUND"
    assert got == list(range(1, len(got) + 1))
    assert len(got) < 30


def test_events_of_nobody_else(stub: CollabServiceStub) -> None:
    """Sessions do not see each other's events."""
    one, two = new_session(stub), new_session(stub)
    append(stub, one, type="one")
    append(stub, two, type="two")
    assert [event.type for event in events(stub, one)] == ["one"]
    assert [event.type for event in events(stub, two)] == ["two"]


_NUMBERS = st.sampled_from([0, 1, 127, 128, 2**28 - 1, 2**28, 2**35, 2**56 - 1, 2**56, 2**63 - 1]) | st.integers(
    0, 2**63 - 1
)
_TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
_LENGTHS = st.sampled_from([0, 1, 126, 127, 128, 16_382, 16_383, 16_384]) | st.integers(0, 20_000)
_EVENTS = st.builds(
    pb.NewEvent,
    actor_id=st.none() | _TEXTS,
    client_seq=st.none() | _NUMBERS,
    type=st.none() | _TEXTS,
    hash=st.none() | st.just("") | _TEXTS,
    signature=st.binary(max_size=1_024),
) | st.builds(pb.NewEvent, binary=_LENGTHS.map(bytes)) | st.builds(
    pb.NewEvent, json=_LENGTHS.map(lambda n: '{"ü":"' + "x" * n + '"}')
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(_EVENTS, min_size=1, max_size=8))
def test_what_rows_carry(stub: CollabServiceStub, server_database_url: str, sent: list[pb.NewEvent]) -> None:
    """A list has the very events that appending them has answered: of the messages that were made with the insert, of
    those that are made when it is read, and of the columns, to which that has to be equal."""
    session_id = new_session(stub)
    answered = [
        stub.AppendEvent(pb.AppendEventRequest(session_id=session_id, event=event), timeout=TIMEOUT).event
        for event in sent
    ]
    assert events(stub, session_id) == answered
    followed = stub.ListEvents(pb.ListEventsRequest(session_id=session_id, follow=True, limit=len(sent)))
    assert [event for message in followed for event in message.events] == answered
    assert events_of_columns(stub, session_id) == answered
    messages = [message.SerializeToString() for message in read(stub, session_id)]
    for part in ("server_seq % 2 = 1", "true"):
        change(
            server_database_url, f"UPDATE collab_events SET envelope = NULL WHERE session_id = {session_id} AND {part}"
        )
        assert [message.SerializeToString() for message in read(stub, session_id)] == messages


def events_of_columns(stub: CollabServiceStub, session_id: int) -> list[pb.Event]:
    """Return events as the columns have them."""
    request = pb.ListEventsRequest(session_id=session_id)
    messages = stub.ListEvents(request, timeout=TIMEOUT, metadata=(("collab-events-of", "columns"),))
    return [event for message in messages for event in message.events]


def change(url: str, statement: str) -> None:
    """Change the database behind the service's back."""
    with psycopg.connect(url) as connection:
        assert connection.execute(statement.encode()).rowcount >= 0


def test_the_insert_makes_the_envelope(stub: CollabServiceStub, server_database_url: str) -> None:
    """Whichever way an event is written, reading has nothing to make: alone, in a batch, with a condition or a key."""
    session_id = new_session(stub)
    append(stub, session_id)
    append(stub, session_id, idempotency_key="a")
    stub.AppendEvents(
        pb.AppendEventsRequest(session_id=session_id, events=[pb.NewEvent()] * 3, expected_last_server_seq=2),
        timeout=TIMEOUT,
    )
    with psycopg.connect(server_database_url) as connection:
        statement = "SELECT count(*), count(envelope) FROM collab_events WHERE session_id = %s"
        assert connection.execute(statement, [session_id]).fetchone() == (5, 5)


def test_a_page_that_is_cut_short_in_the_middle_of_reading_ahead(stub: CollabServiceStub) -> None:
    """Pages are read ahead as if all were full; where large events make one shorter, nothing is missing or doubled."""
    session_id = new_session(stub)
    for first in range(0, 3_000, 500):
        large = first in (500, 1_500)
        batch = [pb.NewEvent(client_seq=first + n, binary=b"x" * (7_000 if large else 7)) for n in range(500)]
        stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=batch), timeout=TIMEOUT)
    messages = read(stub, session_id)
    assert [event.client_seq for message in messages for event in message.events] == list(range(3_000))
    assert all(message.ByteSize() < 1_200_000 and len(message.events) <= 500 for message in messages)
    for since, limit in ((0, 501), (499, 1), (250, 1_700), (700, 2_300), (2_999, 0)):
        numbers = [event.server_seq for event in events(stub, session_id, since_server_seq=since, limit=limit)]
        assert numbers == list(range(since + 1, min(since + limit, 3_000) + 1 if limit else 3_001))
