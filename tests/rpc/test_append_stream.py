"""`AppendStream`: many appends on their way at once, carried out and answered in the order in which they came."""

import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from collab_service.v1.error_reason_pb2 import ErrorReason
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure, append, events, failure, new_session
from tests.rpc.test_lifecycle import until

_PATH = "/collab_service.v1.CollabService/AppendStream"


def request(number: int, session_id: int, *batch: pb.NewEvent, expected: int | None = None) -> pb.AppendStreamRequest:
    """Return a request with a batch."""
    return pb.AppendStreamRequest(
        request_number=number,
        request=pb.AppendEventsRequest(session_id=session_id, events=batch, expected_last_server_seq=expected),
    )


def event(number: int, **fields: Any) -> pb.NewEvent:
    """Return an event that can be told from others."""
    return pb.NewEvent(client_seq=number, **fields)


def answers(stub: CollabServiceStub, *requests: pb.AppendStreamRequest) -> list[pb.AppendStreamResponse]:
    """Send requests over one stream and return the answers."""
    return list(stub.AppendStream(iter(requests), timeout=TIMEOUT))


class Stream:
    """A stream that is sent to little by little."""

    def __init__(self, stub: CollabServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.AppendStreamRequest | None] = queue.SimpleQueue()
        self.call = stub.AppendStream(iter(self._requests.get, None), timeout=TIMEOUT)

    def send(self, *requests: pb.AppendStreamRequest) -> None:
        """Send requests."""
        for one in requests:
            self._requests.put(one)

    def finish(self) -> None:
        """Send no more."""
        self._requests.put(None)

    def collect(self) -> tuple[list[pb.AppendStreamResponse], grpc.RpcError | None]:
        """Return the answers until the end, and the error that it ended with."""
        got: list[pb.AppendStreamResponse] = []
        try:
            got.extend(self.call)
        except grpc.RpcError as error:
            return got, error
        finally:
            self.finish()
        return got, None


def test_answers_in_the_order_of_the_requests(stub: CollabServiceStub) -> None:
    """Each request is answered under the number that it was given, whatever that is, in the order sent."""
    one, two = new_session(stub), new_session(stub)
    numbers = [5, 5, 0, -3, 2**63 - 1, 1] * 50
    got = answers(stub, *(request(number, (one, two)[n % 2], event(n)) for n, number in enumerate(numbers)))
    assert [answer.request_number for answer in got] == numbers
    for offset, session_id in enumerate((one, two)):
        responses = [answer.response for answer in got[offset::2]]
        assert [response.first_server_seq for response in responses] == list(range(1, 151))
        stored = events(stub, session_id)
        assert [e.client_seq for e in stored] == list(range(offset, 300, 2))
        assert [e.create_time for e in stored] == [response.create_time for response in responses]


def test_batches(stub: CollabServiceStub) -> None:
    """A batch is stored as neighbours, and its answer tells from where to where."""
    session_id = new_session(stub)
    got = answers(stub, *(request(n, session_id, *(event(10 * n + i) for i in range(n))) for n in (3, 1, 7)))
    places = [(answer.response.first_server_seq, answer.response.last_server_seq) for answer in got]
    assert places == [(1, 3), (4, 4), (5, 11)]
    assert [e.client_seq for e in events(stub, session_id)] == [30, 31, 32, 10, *range(70, 77)]


def test_a_request_at_fault_is_answered_and_the_stream_goes_on(stub: CollabServiceStub) -> None:
    """Each kind of fault has its code and reason, names what is wrong, and harms no other request."""
    session_id = new_session(stub)
    append(stub, session_id, idempotency_key="known", type="first")
    faults = [
        request(1, session_id),
        request(2, session_id, event(0), event(0, actor_id=""), event(-1)),
        request(3, session_id, event(0), expected=7),
        request(4, 10**15, event(0)),
        request(5, session_id, event(0, idempotency_key="known", type="other")),
        request(6, session_id, *[event(0)] * 1001),
        request(7, session_id, event(0, json="[]")),
        request(8, session_id, event(0, json="{" + " " * 2**20 + "}")),
        pb.AppendStreamRequest(request_number=9),
    ]
    sent = [one for fault in faults for one in (fault, request(100, session_id, event(1)))]
    got = answers(stub, *sent)
    assert all(answer.HasField("response") for answer in got[1::2])
    failures = [answer.failure for answer in got[::2]]
    assert [answer.request_number for answer in got[::2]] == list(range(1, 10))
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert [(f.code, ErrorReason.Name(f.reason).removeprefix("ERROR_REASON_")) for f in failures] == [
        (invalid, "INVALID_REQUEST"),
        (invalid, "INVALID_REQUEST"),
        (grpc.StatusCode.ABORTED.value[0], "SERVER_SEQ_CONFLICT"),
        (grpc.StatusCode.NOT_FOUND.value[0], "SESSION_NOT_FOUND"),
        (invalid, "IDEMPOTENCY_KEY_REUSED"),
        (invalid, "BATCH_TOO_LARGE"),
        (invalid, "PAYLOAD_NOT_A_JSON_OBJECT"),
        (invalid, "EVENT_TOO_LARGE"),
        (invalid, "INVALID_REQUEST"),
    ]
    assert all(f.metadata["side_effects"] == "none" and f.message for f in failures)
    assert {"events[1].actor_id", "events[2].client_seq"} <= set(failures[1].metadata)
    assert (failures[2].metadata["expected"], failures[2].metadata["actual"]) == ("7", "3")
    assert failures[3].metadata["session_id"] == str(10**15)
    assert failures[4].metadata["known_indexes"] == "0"
    assert set(failures[8].metadata) == {"side_effects", "session_id", "events"}
    assert [e.client_seq for e in events(stub, session_id)][1:] == [1] * len(faults)


def test_replays(stub: CollabServiceStub) -> None:
    """The same keys again, also within one stream, return the original."""
    session_id = new_session(stub)
    batch = request(1, session_id, event(1, idempotency_key="k"), event(2))
    got = [answer.response for answer in answers(stub, batch, batch, request(2, session_id, event(3)), batch)]
    assert [(r.first_server_seq, r.last_server_seq, r.replayed) for r in got] == [
        (1, 2, False),
        (1, 2, True),
        (3, 3, False),
        (1, 2, True),
    ]


def test_bytes_that_are_no_request(channel: grpc.Channel, stub: CollabServiceStub) -> None:
    """They cannot be answered under a number: what came before is carried out, and the stream ends with the reason."""
    session_id = new_session(stub)
    good = request(1, session_id, event(1)).SerializeToString()
    call = channel.stream_stream(_PATH, bytes, bytes)(iter([good, b"\xff\xff", good]), timeout=TIMEOUT)
    got: list[bytes] = []
    failed = failure(lambda: got.extend(call))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert len(got) == len(events(stub, session_id)) == 1


def test_an_empty_stream(stub: CollabServiceStub) -> None:
    """No request, no answer, and OK."""
    assert answers(stub) == []


def test_many_streams_at_once(stub: CollabServiceStub) -> None:
    """200 streams into one session: each one's events stand in its order, none is lost."""
    session_id = new_session(stub)
    sent = [[request(i, session_id, event(1000 * n + i)) for i in range(10)] for n in range(200)]
    calls = [stub.AppendStream(iter(requests), timeout=TIMEOUT) for requests in sent]
    for call in calls:
        assert [answer.request_number for answer in call] == list(range(10))
    stored = [e.client_seq for e in events(stub, session_id)]
    assert sorted(stored) == sorted(1000 * n + i for n in range(200) for i in range(10))
    assert all([s for s in stored if s // 1000 == n] == [1000 * n + i for i in range(10)] for n in range(200))


def test_an_end_does_not_deny_what_is_stored(stub: CollabServiceStub, server_database_url: str) -> None:
    """A fault of storage ends a stream with `unknown` where a request that was not answered is stored, else `none`."""
    locked, free = new_session(stub), new_session(stub)
    with psycopg.connect(server_database_url) as other:
        other.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (locked,))
        streams = [Stream(stub), Stream(stub)]
        for stream in streams:
            stream.send(request(1, locked, event(1)))
        streams[1].send(request(2, free, event(2)))
        failures = []
        for stream in streams:
            got, error = stream.collect()
            assert got == []
            assert error is not None
            failures.append(Failure(error))
    assert [failed.reason for failed in failures] == ["STORAGE_UNAVAILABLE"] * 2
    assert [failed.metadata["side_effects"] for failed in failures] == ["none", "unknown"]
    assert (len(events(stub, locked)), len(events(stub, free))) == (0, 1)


def test_a_client_that_leaves(stub: CollabServiceStub, server_database_url: str) -> None:
    """What has not been begun when the caller cancels is not written; the log stays whole and takes others."""
    session_id = new_session(stub)
    with psycopg.connect(server_database_url) as other:
        other.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        stream = Stream(stub)
        stream.send(*(request(n, session_id, event(n)) for n in range(50)))
        stream.call.cancel()
        _, error = stream.collect()
        assert error is not None
        assert error.code() is grpc.StatusCode.CANCELLED
    append(stub, session_id, type="after")
    stored = events(stub, session_id)
    assert [e.server_seq for e in stored] == list(range(1, len(stored) + 1))
    assert stored[-1].type == "after"


def test_a_caller_that_takes_no_answer(database_url: str, directory: Path) -> None:
    """It is held up by flow control: the server's memory stays bounded, and others are served."""
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        for _ in range(20):
            append(stub, session_id, json="{}")
        before = resident_kilobytes(server.process.pid)
        sent = 0

        def requests() -> Iterator[pb.AppendStreamRequest]:
            nonlocal sent
            for n in range(2_000):  # 400 MB
                sent = n
                yield request(n, session_id, event(n, binary=b"x" * 200_000))

        call = stub.AppendStream(requests(), timeout=TIMEOUT)  # nobody asks for the answers
        until(lambda: sent >= 100, "requests that are taken")
        taken = -1
        pause = threading.Event()
        while taken != sent:  # until it is held up, or has sent everything
            taken = sent
            append(stub, session_id, type="other")
            pause.wait(0.3)
        assert resident_kilobytes(server.process.pid) - before < 150_000
        call.cancel()


def test_overload_is_never_an_answer(database_url: str, directory: Path) -> None:
    """Where one append may wait, unary callers are refused; streams are only read more slowly."""
    with (
        ServeProcess("--database-url", database_url, "--max-waiting-appends", "1", cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        sent = [[request(i, session_id, event(100 * n + i)) for i in range(100)] for n in range(8)]
        calls = [stub.AppendStream(iter(requests), timeout=TIMEOUT) for requests in sent]
        reasons: set[str] = set()
        while "OVERLOADED" not in reasons and calls[0].is_active():
            try:
                append(stub, session_id, type="unary")
            except grpc.RpcError as error:
                reasons.add(Failure(error).reason)
        got = [answer for call in calls for answer in call]
        assert len(got) == 800
        assert all(answer.HasField("response") for answer in got)
        assert reasons <= {"OVERLOADED"}


def test_the_database_goes_away(own_cluster: Cluster, directory: Path) -> None:
    """The stream ends with the reason; nothing of what was not answered is stored later; the next stream goes on."""
    with (
        ServeProcess("--database-url", own_cluster.url, cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        stream = Stream(stub)
        stream.send(*(request(n, session_id, event(n)) for n in range(1, 101)))
        assert [next(stream.call).response.first_server_seq for _ in range(100)] == list(range(1, 101))
        own_cluster.stop()
        stream.send(*(request(n, session_id, event(n)) for n in range(101, 201)))
        got, error = stream.collect()
        assert got == []
        assert error is not None
        assert Failure(error).reason == "STORAGE_UNAVAILABLE"
        own_cluster.start()

        def is_back() -> bool:
            try:
                return bool(answers(stub, request(1, session_id, event(0))))
            except grpc.RpcError:
                return False

        until(is_back, "the database")
        assert [e.client_seq for e in events(stub, session_id)] == [*range(1, 101), 0]


@pytest.mark.parametrize("signals", [1, 2])
def test_the_server_stops(database_url: str, directory: Path, signals: int) -> None:
    """What was read is answered, the stream ends with SHUTTING_DOWN, and exactly what was answered is stored."""
    with ServeProcess("--database-url", database_url, cwd=directory) as server:
        with grpc.insecure_channel(server.grpc_address) as channel:
            stub = CollabServiceStub(channel)
            session_id = new_session(stub)
            stream = Stream(stub)
            stream.send(*(request(n, session_id, event(n)) for n in range(1, 101)))
            first = next(stream.call)
            server.send(signal.SIGTERM)
            if signals == 2:
                server.wait_for("stopping")
                server.send(signal.SIGTERM)
            got, error = stream.collect()
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            if signals == 1:
                assert Failure(error).reason == "SHUTTING_DOWN"
        assert server.wait() == 0
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT client_seq FROM collab_events WHERE session_id = %s ORDER BY server_seq", (session_id,)
        ).fetchall()
    stored = [row[0] for row in rows]
    answered = [first.response.first_server_seq, *(answer.response.first_server_seq for answer in got)]
    assert answered == list(range(1, len(answered) + 1))
    assert stored == list(range(1, len(stored) + 1))
    assert len(stored) == len(answered) if signals == 1 else len(stored) >= len(answered)
