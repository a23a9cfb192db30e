"""Bad input: one answer that names every bad field at once and says what would be right; nothing is written."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, append, events, failure, new_session

LONG = "é" * 128  # 256 bytes


@pytest.mark.parametrize(
    ("call", "request_", "fields"),
    [
        ("CreateSession", {"language_id": 0, "owner_id": "", "room": "a\0b"}, {"language_id", "owner_id", "room"}),
        ("CreateSession", {"language_id": -1, "owner_id": LONG, "room": ""}, {"language_id", "owner_id", "room"}),
        ("GetSession", {}, {"session_id"}),
        ("GetSession", {"session_id": 0}, {"session_id"}),
        ("GetSession", {"room": ""}, {"room"}),
        ("ListSessions", {"owner_id": "", "page_size": -1, "language_id": 0}, {"owner_id", "page_size", "language_id"}),
        ("TouchSession", {"session_id": -1}, {"session_id"}),
        ("DeleteSession", {}, {"session_id"}),
        ("RemoveUser", {}, {"user_id"}),
        ("RemoveUser", {"user_id": "\0"}, {"user_id"}),
        ("AppendEvent", {}, {"session_id", "event"}),
        (
            "AppendEvent",
            {
                "session_id": -(2**63),
                "expected_last_server_seq": -1,
                "event": {
                    "actor_id": "", "client_seq": -1, "type": "\0", "hash": LONG, "idempotency_key": "",
                    "signature": b"x" * 1025, "json": "{",
                },
            },
            {
                "session_id", "expected_last_server_seq", "event.actor_id", "event.client_seq", "event.type",
                "event.hash", "event.idempotency_key", "event.signature", "event.json",
            },
        ),
        ("AppendEvents", {"session_id": 1}, {"events"}),
        (
            "AppendEvents",
            {"session_id": 1, "events": [{}, {"idempotency_key": "k"}, {"actor_id": ""}, {"idempotency_key": "k"}]},
            {"events[2].actor_id", "events[3].idempotency_key"},
        ),
        (
            "ListEvents",
            {"session_id": 0, "since_server_seq": -1, "limit": -1, "types": ["a", "", LONG]},
            {"session_id", "since_server_seq", "limit", "types[1]", "types[2]"},
        ),
        ("ListEvents", {"session_id": 1, "types": ["t"] * 1001}, {"types"}),
    ],
)  # fmt: skip
def test_every_bad_field_at_once(
    stub: CollabServiceStub, call: str, request_: dict[str, Any], fields: set[str]
) -> None:
    """One INVALID_ARGUMENT names exactly the bad fields."""
    kind = getattr(pb, f"{call}Request")
    method: Callable[[Any], Any] = getattr(stub, call)
    invoke = (lambda: list(method(kind(**request_)))) if call == "ListEvents" else lambda: method(kind(**request_))
    failed = failure(invoke)
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.reason == "INVALID_REQUEST"
    assert set(failed.violations) == fields
    assert all(text.startswith("must ") for text in failed.violations.values())
    assert failed.metadata == {"side_effects": "none"}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"json": ""}, "PAYLOAD_NOT_A_JSON_OBJECT"),
        ({"json": "[]"}, "PAYLOAD_NOT_A_JSON_OBJECT"),
        ({"json": r'{"a":"\ud800"}'}, "PAYLOAD_NOT_A_JSON_OBJECT"),
        ({"json": '{"a":"' + "x" * 1_048_576 + '"}'}, "EVENT_TOO_LARGE"),
        ({"json": '{"a":"' + "é" * 524_285 + '"}'}, "EVENT_TOO_LARGE"),
        ({"binary": b"x" * 1_048_577}, "EVENT_TOO_LARGE"),
        ({"binary": b"x" * 1_048_577, "actor_id": ""}, "INVALID_REQUEST"),
    ],
)
def test_reasons_of_payloads(stub: CollabServiceStub, event: dict[str, Any], reason: str) -> None:
    """The reason is the fields' own, or INVALID_REQUEST where they mix."""
    failed = failure(lambda: append(stub, 1, **event))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_batches_that_are_too_large(stub: CollabServiceStub) -> None:
    """A batch is bounded by events and by bytes, and a refused one leaves nothing."""
    session = new_session(stub)
    for batch in ([pb.NewEvent()] * 1001, [pb.NewEvent(binary=b"x" * 1_000_000)] * 5):
        request = pb.AppendEventsRequest(session_id=session, events=batch)
        failed = failure(lambda request=request: stub.AppendEvents(request, timeout=TIMEOUT))  # type: ignore[misc]
        assert (failed.reason, list(failed.violations)) == ("BATCH_TOO_LARGE", ["events"])
    assert events(stub, session) == []


def test_a_great_many_bad_fields_fit_into_the_answer(stub: CollabServiceStub) -> None:
    """With more bad fields than fit, the answer still arrives and says how many there are."""
    request = pb.AppendEventsRequest(events=[pb.NewEvent(actor_id="", type="", client_seq=-1)] * 1000)
    failed = failure(lambda: stub.AppendEvents(request, timeout=TIMEOUT))
    assert "events[0].actor_id" in failed.violations
    assert failed.violations["*"].startswith("and 29")


def test_every_limit_is_the_last_that_is_taken(stub: CollabServiceStub) -> None:
    """What is just within the limits is accepted."""
    session = new_session(stub, room="r" * 245 + str(id(stub))[-10:], owner_id="é" * 127, language_id=2**63 - 1)
    fields: dict[str, Any] = {name: "é" * 127 + "x" for name in ("actor_id", "type", "hash", "idempotency_key")}
    answer = append(stub, session, client_seq=2**63 - 1, signature=b"s" * 1024, binary=b"x" * 1_048_576, **fields)
    assert answer.event.server_seq == 1


def test_a_message_over_the_receive_limit(server: ServeProcess) -> None:
    """A message over 8 MiB is refused by the transport, and the connection goes on."""
    with grpc.insecure_channel(server.grpc_address, [("grpc.max_send_message_length", -1)]) as channel:
        stub = CollabServiceStub(channel)
        request = pb.AppendEventsRequest(session_id=1, events=[pb.NewEvent(binary=b"x" * 1_048_576)] * 9)
        with pytest.raises(grpc.RpcError) as caught:
            stub.AppendEvents(request, timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        new_session(stub)
