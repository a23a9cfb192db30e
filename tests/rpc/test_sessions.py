"""Sessions over gRPC: created, found, listed, touched, deleted."""

import time
import uuid

import grpc
import psycopg
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.rpc.calls import TIMEOUT, append, failure, new_session


def unique(prefix: str) -> str:
    """Return a name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex}"


def all_pages(stub: CollabServiceStub, **filters: object) -> list[pb.ListSessionsResponse]:
    """Page to the end."""
    pages = [stub.ListSessions(pb.ListSessionsRequest(**filters))]  # type: ignore[arg-type]
    while token := pages[-1].next_page_token:
        pages.append(stub.ListSessions(pb.ListSessionsRequest(page_token=token, **filters)))  # type: ignore[arg-type]
    return pages


def test_create_and_get(stub: CollabServiceStub) -> None:
    """A session comes back as it was created, by its id and by its room."""
    room = unique("room")
    created = stub.CreateSession(pb.CreateSessionRequest(language_id=7, owner_id="ada", room=room))
    session = created.session
    assert created.created
    assert (session.language_id, session.owner_id, session.room) == (7, "ada", room)
    assert (session.first_server_seq, session.last_server_seq) == (1, 0)
    assert session.create_time == session.last_active_time
    assert stub.GetSession(pb.GetSessionRequest(session_id=session.id)).session == session
    assert stub.GetSession(pb.GetSessionRequest(room=room)).session == session
    bare = stub.CreateSession(pb.CreateSessionRequest()).session
    assert not any(bare.HasField(field) for field in ("language_id", "owner_id", "room"))


def test_a_room_names_one_session(stub: CollabServiceStub) -> None:
    """The second call with a room returns the first session and changes nothing; also when many come at once."""
    room = unique("room")
    calls = [
        stub.CreateSession.future(pb.CreateSessionRequest(room=room, owner_id=f"owner-{n}"), timeout=TIMEOUT)
        for n in range(20)
    ]
    answers = [call.result() for call in calls]
    assert sum(answer.created for answer in answers) == 1
    (winner,) = (answer.session for answer in answers if answer.created)
    assert all(answer.session == winner for answer in answers)


def test_not_found(stub: CollabServiceStub) -> None:
    """Every call on a session that does not exist says so."""
    missing = 10**15
    calls = [
        lambda: stub.GetSession(pb.GetSessionRequest(session_id=missing)),
        lambda: stub.GetSession(pb.GetSessionRequest(room=unique("no"))),
        lambda: stub.TouchSession(pb.TouchSessionRequest(session_id=missing)),
        lambda: stub.DeleteSession(pb.DeleteSessionRequest(session_id=missing)),
        lambda: append(stub, missing),
        lambda: stub.AppendEvents(pb.AppendEventsRequest(session_id=missing, events=[pb.NewEvent()])),
        lambda: list(stub.ListEvents(pb.ListEventsRequest(session_id=missing))),
    ]
    for call in calls:
        failed = failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        assert failed.metadata["side_effects"] == "none"


def test_pages_hold_every_session_once(stub: CollabServiceStub) -> None:
    """Paging with filters returns each session once, the most recently active first, with a token but at the end."""
    owner = unique("owner")
    ids = [new_session(stub, owner_id=owner, language_id=1 + n % 2) for n in range(25)]
    append(stub, ids[3])
    stub.TouchSession(pb.TouchSessionRequest(session_id=ids[8]))
    append(stub, ids[5])
    expected = [ids[5], ids[8], ids[3], *(i for i in reversed(ids) if i not in (ids[5], ids[8], ids[3]))]
    for size, pages in ((10, 3), (5, 5), (25, 1), (0, 1), (5000, 1)):
        found = all_pages(stub, owner_id=owner, page_size=size)
        assert len(found) == pages
        sessions = [session for page in found for session in page.sessions]
        assert [session.id for session in sessions] == expected
        times = [session.last_active_time.ToMicroseconds() for session in sessions]
        assert times == sorted(times, reverse=True)
    odd = all_pages(stub, owner_id=owner, language_id=2, page_size=4)
    assert [s.id for page in odd for s in page.sessions] == [i for i in expected if i in ids[1::2]]
    assert sum(len(page.sessions) for page in all_pages(stub, owner_id=unique("nobody"))) == 0


def test_page_tokens_are_bound_to_their_filters(stub: CollabServiceStub) -> None:
    """A token that was made for other filters, or is none of ours, is refused."""
    owner = unique("owner")
    for _ in range(3):
        new_session(stub, owner_id=owner)
    token = stub.ListSessions(pb.ListSessionsRequest(owner_id=owner, page_size=1)).next_page_token
    for wrong in (
        pb.ListSessionsRequest(page_token=token),
        pb.ListSessionsRequest(page_token=token, owner_id=owner + "x"),
        pb.ListSessionsRequest(page_token=token, owner_id=owner, language_id=1),
        pb.ListSessionsRequest(page_token=token[:-1], owner_id=owner),
        pb.ListSessionsRequest(page_token=token + "A", owner_id=owner),
        pb.ListSessionsRequest(page_token="B" + token[1:], owner_id=owner),
        pb.ListSessionsRequest(page_token="é€", owner_id=owner),
        pb.ListSessionsRequest(page_token="x" * 10_000, owner_id=owner),
    ):
        failed = failure(lambda wrong=wrong: stub.ListSessions(wrong))  # type: ignore[misc]
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
        assert list(failed.violations) == ["page_token"]


def test_touch_moves_the_activity(stub: CollabServiceStub) -> None:
    """last_active_time is the time of the touch, or of the last event when that is later."""
    session = new_session(stub)
    before = time.time_ns() // 1000
    touched = stub.TouchSession(pb.TouchSessionRequest(session_id=session)).session
    assert touched.last_active_time.ToMicroseconds() >= before
    event = append(stub, session).event
    shown = stub.GetSession(pb.GetSessionRequest(session_id=session)).session
    assert shown.last_active_time == event.create_time


def test_activity_is_written_down(stub: CollabServiceStub, server_database_url: str) -> None:
    """The list's order survives the server: the session's row gets the last event's time."""
    owner = unique("owner")
    session = new_session(stub, owner_id=owner)
    event = append(stub, session).event
    stub.ListSessions(pb.ListSessionsRequest(owner_id=owner))
    with psycopg.connect(server_database_url) as connection:
        row = connection.execute("SELECT last_active FROM collab_sessions WHERE id = %s", (session,)).fetchone()
    assert row is not None
    assert row[0].timestamp() == pytest.approx(event.create_time.ToMicroseconds() / 1e6, abs=1e-5)


def test_deleted_is_gone_and_its_room_is_free(stub: CollabServiceStub, server_database_url: str) -> None:
    """From the answer on a session is not found, listed or written to; its room is free; its rows go."""
    room, owner = unique("room"), unique("owner")
    session = new_session(stub, room=room, owner_id=owner)
    batch = pb.AppendEventsRequest(session_id=session, events=[pb.NewEvent()] * 1000)
    for _ in range(12):
        stub.AppendEvents(batch)
    stub.DeleteSession(pb.DeleteSessionRequest(session_id=session))
    for call in (
        lambda: stub.GetSession(pb.GetSessionRequest(session_id=session)),
        lambda: append(stub, session),
        lambda: list(stub.ListEvents(pb.ListEventsRequest(session_id=session))),
        lambda: stub.DeleteSession(pb.DeleteSessionRequest(session_id=session)),
        lambda: stub.TouchSession(pb.TouchSessionRequest(session_id=session)),
    ):
        assert failure(call).reason == "SESSION_NOT_FOUND"
    assert not stub.ListSessions(pb.ListSessionsRequest(owner_id=owner)).sessions
    second = stub.CreateSession(pb.CreateSessionRequest(room=room))
    assert second.created
    assert second.session.id != session
    deadline = time.monotonic() + 20
    with psycopg.connect(server_database_url, autocommit=True) as connection:
        query = (
            "SELECT (SELECT count(*) FROM collab_sessions WHERE id = %(id)s)"
            " + (SELECT count(*) FROM collab_events WHERE session_id = %(id)s)"
        )
        while (row := connection.execute(query, {"id": session}).fetchone()) and row[0]:
            assert time.monotonic() < deadline


def test_remove_user(stub: CollabServiceStub) -> None:
    """The sessions of a user have no owner from now on; events keep their actor; other owners keep theirs."""
    user, other = unique("user"), unique("user")
    ids = [new_session(stub, owner_id=user) for _ in range(5)]
    kept = new_session(stub, owner_id=other)
    append(stub, ids[0], actor_id=user)
    assert stub.RemoveUser(pb.RemoveUserRequest(user_id=user)).sessions_released == 5
    assert stub.RemoveUser(pb.RemoveUserRequest(user_id=user)).sessions_released == 0
    for session_id in ids:
        assert not stub.GetSession(pb.GetSessionRequest(session_id=session_id)).session.HasField("owner_id")
    assert stub.GetSession(pb.GetSessionRequest(session_id=kept)).session.owner_id == other
    message = next(iter(stub.ListEvents(pb.ListEventsRequest(session_id=ids[0]))))
    assert message.events[0].actor_id == user
