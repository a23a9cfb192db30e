"""Arbitrary requests and arbitrary bytes at the running server: the promises hold, and errors are ours."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collab_service.model import NewEvent
from collab_service.model.chain import chain_next, chain_start, content_digest
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.rpc.calls import TIMEOUT, Failure, append, events, new_session, raw_call
from tests.rpc.content import content_of

EXPECTED = {
    "INVALID_REQUEST", "PAYLOAD_NOT_A_JSON_OBJECT", "PAGE_TOKEN_INVALID", "EVENT_TOO_LARGE", "BATCH_TOO_LARGE",
    "IDEMPOTENCY_KEY_REUSED", "SESSION_NOT_FOUND", "SERVER_SEQ_CONFLICT", "SERVER_SEQ_BEYOND_HEAD",
}  # fmt: skip
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)

numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5)
texts = st.text(max_size=10) | st.sampled_from(["", "k1", "k2", "\0", "x" * 255, "é" * 128, "\U0010ffff"])
new_events = st.builds(
    pb.NewEvent,
    actor_id=st.none() | texts,
    client_seq=st.none() | numbers,
    type=st.none() | texts,
    json=st.none() | texts | st.sampled_from(["{}", '{"a":1}', "[]", "{", '{"a":"\x00"}']),
    hash=st.none() | texts,
    signature=st.binary(max_size=8),
    idempotency_key=st.none() | texts,
)
expected = st.none() | numbers


class Walk:
    """Calls one session and checks after each call what must hold."""

    def __init__(self, stub: CollabServiceStub) -> None:
        self.stub = stub
        self.session = new_session(stub)
        self.stored: list[NewEvent] = []

    def call(self, invoke: Callable[[], Any]) -> Any:
        """Make a call; return its answer, or None for one of the errors that a caller can cause."""
        try:
            return invoke()
        except grpc.RpcError as error:
            failed = Failure(error)
            assert failed.reason in EXPECTED, failed.message
            assert failed.metadata["side_effects"] == "none"
            return None

    def append(self, event: pb.NewEvent, expected: int | None) -> None:
        """Append one event."""
        request = pb.AppendEventRequest(session_id=self.session, event=event, expected_last_server_seq=expected)
        answer = self.call(lambda: self.stub.AppendEvent(request, timeout=TIMEOUT))
        if answer is not None:
            self.acknowledge(answer.event.server_seq, [event], answer.replayed)

    def append_batch(self, batch: list[pb.NewEvent], expected: int | None) -> None:
        """Append a batch."""
        request = pb.AppendEventsRequest(session_id=self.session, events=batch, expected_last_server_seq=expected)
        answer = self.call(lambda: self.stub.AppendEvents(request, timeout=TIMEOUT))
        if answer is not None:
            assert answer.last_server_seq - answer.first_server_seq + 1 == len(batch)
            self.acknowledge(answer.first_server_seq, batch, answer.replayed)

    def acknowledge(self, first: int, batch: list[pb.NewEvent], replayed: bool) -> None:
        """Note what an OK promised."""
        contents = [content_of(event) for event in batch]
        if replayed:
            assert self.stored[first - 1 : first - 1 + len(batch)] == contents
        else:
            assert first == len(self.stored) + 1
            self.stored += contents

    def check(self) -> None:
        """Compare the log with what was acknowledged."""
        log = events(self.stub, self.session)
        assert [event.server_seq for event in log] == list(range(1, len(self.stored) + 1))
        assert [content_of(event) for event in log] == self.stored
        chain = chain_start(self.session)
        for event in log:
            time = event.create_time.ToMicroseconds()
            chain = chain_next(chain, self.session, event.server_seq, time, content_digest(content_of(event)))
            assert event.chain_hash == chain


@FUZZ
@given(
    st.lists(
        st.tuples(new_events, expected) | st.tuples(st.lists(new_events, max_size=5), expected),
        max_size=12,
    )
)
def test_acknowledged_is_stored_and_refused_leaves_nothing(
    stub: CollabServiceStub, calls: list[tuple[pb.NewEvent | list[pb.NewEvent], int | None]]
) -> None:
    """Whatever is sent: numbers contiguous, acknowledged = stored, errors without side effects, chain valid."""
    walk = Walk(stub)
    for what, condition in calls:
        if isinstance(what, list):
            walk.append_batch(what, condition)
        else:
            walk.append(what, condition)
    walk.check()


@FUZZ
@given(session=numbers, since=numbers, limit=numbers, types=st.lists(texts, max_size=3))
def test_reading_with_anything(stub: CollabServiceStub, session: int, since: int, limit: int, types: list[str]) -> None:
    """A read answers in order or says what is wrong."""
    request = pb.ListEventsRequest(session_id=session, since_server_seq=since, limit=limit, types=types)
    Walk(stub).call(lambda: list(stub.ListEvents(request, timeout=TIMEOUT)))


@FUZZ
@given(
    language=st.none() | numbers,
    owner=st.none() | texts,
    room=st.none() | texts,
    size=st.integers(-(2**31), 2**31 - 1),
    token=texts,
)
def test_sessions_with_anything(
    stub: CollabServiceStub, language: int | None, owner: str | None, room: str | None, size: int, token: str
) -> None:
    """Calls on sessions answer or say what is wrong."""
    walk = Walk(stub)
    created = walk.call(
        lambda: stub.CreateSession(
            pb.CreateSessionRequest(language_id=language, owner_id=owner, room=room), timeout=TIMEOUT
        )
    )
    if created is not None:
        shown = stub.GetSession(pb.GetSessionRequest(session_id=created.session.id), timeout=TIMEOUT)
        assert shown.session == created.session
    listing = pb.ListSessionsRequest(language_id=language, owner_id=owner, page_size=min(size, 50), page_token=token)
    walk.call(lambda: stub.ListSessions(listing, timeout=TIMEOUT))


METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["CollabService"].methods]


@FUZZ
@given(method=st.sampled_from([m for m in METHODS if m != "AppendStream"]), data=st.binary(max_size=60))
def test_arbitrary_bytes(channel: grpc.Channel, method: str, data: bytes) -> None:
    """Bytes that are no message are INVALID_REQUEST; nothing is INTERNAL or UNKNOWN."""
    error = raw_call(channel, method, data)
    if error is not None and error.code() is not grpc.StatusCode.UNIMPLEMENTED:
        assert Failure(error).reason in EXPECTED


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x03\x0a\x01\xff", b"\x12\x05\x0a\x03\xed\xa0\x80"])
def test_undecodable_bytes_name_the_request(channel: grpc.Channel, stub: CollabServiceStub, data: bytes) -> None:
    """Wrong wire format, invalid UTF-8 and surrogates as UTF-8 are all INVALID_REQUEST, and the server goes on."""
    error = raw_call(channel, "AppendEvent", data)
    assert error is not None
    failed = Failure(error)
    assert (failed.reason, list(failed.violations)) == ("INVALID_REQUEST", ["request"])
    assert append(stub, new_session(stub)).event.server_seq == 1
