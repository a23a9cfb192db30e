"""ListEvents without follow: ordered, unique, gap-free, resumable, bookmarkable."""

import threading

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.rpc.calls import append, events, failure, new_session, read

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


def test_later_versions_answer_unimplemented(stub: CollabServiceStub) -> None:
    """What is not there yet says so."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.AppendStream(iter([pb.AppendStreamRequest()])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_events_of_nobody_else(stub: CollabServiceStub) -> None:
    """Sessions do not see each other's events."""
    one, two = new_session(stub), new_session(stub)
    append(stub, one, type="one")
    append(stub, two, type="two")
    assert [event.type for event in events(stub, one)] == ["one"]
    assert [event.type for event in events(stub, two)] == ["two"]
