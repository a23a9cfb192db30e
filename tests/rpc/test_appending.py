"""Appending over gRPC: what an OK promises, and what comes back."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from collab_service.model.chain import chain_next, chain_start, content_digest
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, append, events, failure, new_session
from tests.rpc.content import content_of


def test_every_field_comes_back_as_it_was_given(stub: CollabServiceStub) -> None:
    """What an author gave is stored and returned byte for byte, in the answer and in every later read."""
    session = new_session(stub)
    full: dict[str, Any] = {
        "actor_id": "ada 😀",
        "client_seq": 2**63 - 1,
        "type": "x" * 255,
        "json": ' {"b": 1.0, "a":9007199254740993,"a":"\\u0000é" }\n',
        "hash": "sha256:abc",
        "signature": b"\x00\xff",
        "idempotency_key": "k",
    }
    before = time.time_ns() // 1000
    answer = append(stub, session, **full)
    assert not answer.replayed
    event = answer.event
    assert {name: getattr(event, name) for name in full} == full
    assert (event.session_id, event.server_seq) == (session, 1)
    assert event.id >= 1
    assert before <= event.create_time.ToMicroseconds() <= time.time_ns() // 1000
    assert events(stub, session) == [event]


def test_absent_and_empty(stub: CollabServiceStub) -> None:
    """Absent stays absent, empty stays empty, and no payload is `{}`."""
    session = new_session(stub)
    nothing = append(stub, session).event
    assert nothing.json == "{}"
    for field in ("actor_id", "client_seq", "type", "hash", "idempotency_key"):
        assert not nothing.HasField(field)
    empty = append(stub, session, hash="", binary=b"", client_seq=0).event
    assert (empty.HasField("hash"), empty.HasField("client_seq"), empty.WhichOneof("payload")) == (True, True, "binary")
    assert events(stub, session) == [nothing, empty]


def test_the_chain_is_computed_as_the_contract_says(stub: CollabServiceStub) -> None:
    """Whoever reads the log can compute every chain hash, and the session shows the last one."""
    session = new_session(stub)
    shown = stub.GetSession(pb.GetSessionRequest(session_id=session)).session
    chain = chain_start(session)
    assert shown.chain_hash == chain
    append(stub, session, actor_id="ada", json='{"a":1}')
    append(stub, session, binary=b"\x00", signature=b"s")
    append(stub, session)
    for event in events(stub, session):
        digest = content_digest(content_of(event))
        chain = chain_next(chain, session, event.server_seq, event.create_time.ToMicroseconds(), digest)
        assert event.chain_hash == chain
    shown = stub.GetSession(pb.GetSessionRequest(session_id=session)).session
    assert (shown.chain_hash, shown.last_server_seq, shown.first_server_seq) == (chain, 3, 1)


def test_idempotency(stub: CollabServiceStub) -> None:
    """The same key and content returns the original, before the condition is looked at; other content is refused."""
    session = new_session(stub)
    first = append(stub, session, idempotency_key="k", json="{}", expected=0)
    again = append(stub, session, idempotency_key="k", expected=0)
    assert (again.replayed, again.event) == (True, first.event)
    refused = failure(lambda: append(stub, session, idempotency_key="k", json="{ }"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDEMPOTENCY_KEY_REUSED")
    assert list(refused.violations) == ["event.idempotency_key"]
    assert refused.metadata == {"known_indexes": "0", "side_effects": "none"}
    other = new_session(stub)
    assert not append(stub, other, idempotency_key="k", json="{ }").replayed


def test_conditional_append(stub: CollabServiceStub) -> None:
    """expected_last_server_seq makes an append conditional; 0 means that the session must be empty."""
    session = new_session(stub)
    append(stub, session, expected=0)
    refused = failure(lambda: append(stub, session, expected=0))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "SERVER_SEQ_CONFLICT")
    assert refused.metadata == {"expected": "0", "actual": "1", "side_effects": "none"}
    assert append(stub, session, expected=1).event.server_seq == 2


def test_batches(stub: CollabServiceStub) -> None:
    """A batch is stored whole, as neighbours, and safe to retry with one key."""
    session = new_session(stub)
    append(stub, session)
    batch = [pb.NewEvent(idempotency_key="k"), *(pb.NewEvent(client_seq=n) for n in range(999))]
    request = pb.AppendEventsRequest(session_id=session, events=batch, expected_last_server_seq=1)
    answer = stub.AppendEvents(request, timeout=TIMEOUT)
    assert (answer.first_server_seq, answer.last_server_seq, answer.replayed) == (2, 1001, False)
    again = stub.AppendEvents(request, timeout=TIMEOUT)
    assert (again.first_server_seq, again.last_server_seq, again.replayed) == (2, 1001, True)
    assert again.create_time == answer.create_time
    stored = events(stub, session)
    assert len(stored) == 1001
    assert {e.create_time.ToMicroseconds() for e in stored[1:]} == {answer.create_time.ToMicroseconds()}
    reused = failure(
        lambda: stub.AppendEvents(
            pb.AppendEventsRequest(session_id=session, events=[pb.NewEvent(type="new"), *batch[:2]])
        )
    )
    assert (reused.reason, reused.metadata["known_indexes"]) == ("IDEMPOTENCY_KEY_REUSED", "1")
    assert list(reused.violations) == ["events[1].idempotency_key"]


def test_many_reused_keys_fit_into_the_answer(stub: CollabServiceStub) -> None:
    """However many keys are known already, the answer reaches a client with the usual limits."""
    session = new_session(stub)
    batch = [pb.NewEvent(idempotency_key=f"key-{n}") for n in range(1000)]
    stub.AppendEvents(pb.AppendEventsRequest(session_id=session, events=batch), timeout=TIMEOUT)
    batch[500].type = "changed"
    request = pb.AppendEventsRequest(session_id=session, events=batch)
    refused = failure(lambda: stub.AppendEvents(request, timeout=TIMEOUT))
    assert refused.reason == "IDEMPOTENCY_KEY_REUSED"
    known = [int(index) for index in refused.metadata["known_indexes"].split(",")]
    assert known == list(range(len(known)))  # as many as there is room for, and none of them cut
    assert len(known) > 200
    assert "more bad fields" in refused.violations["*"]


def test_many_connections_write_one_session(server: ServeProcess) -> None:
    """Hundreds of appends at once over several connections: numbers 1 to n, each acknowledged once."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        session = new_session(CollabServiceStub(channel))

    def write(writer: int) -> list[int]:
        with grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as own:
            stub = CollabServiceStub(own)
            calls = [
                stub.AppendEvent.future(
                    pb.AppendEventRequest(session_id=session, event=pb.NewEvent(actor_id=f"w{writer}", client_seq=n)),
                    timeout=TIMEOUT,
                )
                for n in range(50)
            ]
            return [call.result().event.server_seq for call in calls]

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for written in pool.map(write, range(8)) for number in written]
    assert sorted(numbers) == list(range(1, 401))


def test_large_payloads(stub: CollabServiceStub) -> None:
    """A payload of the largest size, and a batch of the largest size, are stored and read back."""
    session = new_session(stub)
    big = b"\x00" * (1024 * 1024)
    assert append(stub, session, binary=big).event.binary == big
    text = '{"t":"' + "é" * ((1024 * 1024 - 8) // 2) + '"}'
    request = pb.AppendEventsRequest(
        session_id=session, events=[pb.NewEvent(json=text)] * 3 + [pb.NewEvent(binary=big)]
    )
    stub.AppendEvents(request, timeout=TIMEOUT)
    assert [len(e.json or e.binary) for e in events(stub, session)] == [
        len(big),
        len(text),
        len(text),
        len(text),
        len(big),
    ]
