"""The metrics of appends and calls: what they tell is what was done."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psycopg
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, append, failure, new_session
from tests.rpc.follows import Follow, connect
from tests.scrapes import Scrape, scrape
from tests.waiting import until

_NO_SESSION = 2**62


@pytest.fixture
def own_url(new_database: Callable[[], str]) -> str:
    """The database behind `alone`."""
    return new_database()


@pytest.fixture
def alone(own_url: str, directory: Path) -> Iterator[ServeProcess]:
    """A server that nobody else calls."""
    with ServeProcess("--database-url", own_url, cwd=directory) as process:
        yield process
        assert process.stop() == 0


def test_appends_and_calls(alone: ServeProcess) -> None:
    """Each append is counted once, stored, replayed or refused; each call by how it ended; each message and byte."""
    with grpc.insecure_channel(alone.grpc_address) as channel:
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        for number in range(3):
            append(stub, session_id, json='{"a":1}', idempotency_key=f"k-{number}")
        one = pb.AppendEventRequest(
            session_id=session_id, event=pb.NewEvent(json='{"a":1}', idempotency_key="k-1")
        ).ByteSize()
        assert append(stub, session_id, json='{"a":1}', idempotency_key="k-1").replayed
        batch = [pb.NewEvent(binary=b"12345")] * 10
        request = pb.AppendEventsRequest(session_id=session_id, events=batch)
        stub.AppendEvents(request, timeout=TIMEOUT)
        failure(lambda: append(stub, session_id, expected=1))
        failure(lambda: append(stub, session_id, idempotency_key="k-1"))
        failure(lambda: append(stub, _NO_SESSION))
        failure(lambda: append(stub, 0))
        listed = channel.unary_stream("/collab_service.v1.CollabService/ListEvents", bytes, bytes)
        sizes = [len(data) for data in listed(pb.ListEventsRequest(session_id=session_id).SerializeToString())]
        told = scrape(alone.http_address)
    assert appends(told) == {
        ("stored", ""): 4,
        ("replayed", ""): 1,
        ("refused", "SERVER_SEQ_CONFLICT"): 1,
        ("refused", "IDEMPOTENCY_KEY_REUSED"): 1,
        ("refused", "SESSION_NOT_FOUND"): 1,
    }
    assert told.value("collab_stored_events_total") == 13
    assert told.value("collab_stored_bytes_total") == 3 * one + request.ByteSize()
    assert told.value("collab_append_transaction_appends_count") == 5
    assert told.value("collab_append_transaction_appends_sum") == 5
    assert told.value("collab_append_transaction_events_sum") == 13
    assert told.value("collab_append_transaction_events_bucket", le="8.0") == 4
    waited, seconds, commit = (
        told.value(f"collab_append_{name}_seconds_sum") for name in ("wait", "transaction", "commit")
    )
    assert 0 <= commit <= seconds < 5
    assert 0 <= waited < 5
    assert {
        (sample.labels["method"], sample.labels["code"], sample.labels["reason"]): sample.value
        for sample in told.samples
        if sample.name == "collab_rpcs_total" and sample.value
    } == {
        ("CreateSession", "OK", ""): 1,
        ("AppendEvent", "OK", ""): 4,
        ("AppendEvents", "OK", ""): 1,
        ("AppendEvent", "ABORTED", "SERVER_SEQ_CONFLICT"): 1,
        ("AppendEvent", "INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REUSED"): 1,
        ("AppendEvent", "NOT_FOUND", "SESSION_NOT_FOUND"): 1,
        ("AppendEvent", "INVALID_ARGUMENT", "INVALID_REQUEST"): 1,
        ("ListEvents", "OK", ""): 1,
    }
    assert told.value("collab_sent_messages_total", kind="read") == len(sizes)
    assert told.value("collab_sent_bytes_total", kind="read") == sum(sizes)
    assert told.value("collab_rpcs_in_progress") == 0


async def test_followers_and_calls_in_progress(alone: ServeProcess) -> None:
    """A follow is a call in progress until it is left, and then one that was cancelled."""
    async with connect(alone.grpc_address) as stub:
        session = await stub.CreateSession(pb.CreateSessionRequest(), timeout=TIMEOUT)
        async with Follow(stub, session.session.id) as follow:
            await follow.until_through(0)
            assert scrape(alone.http_address).value("collab_rpcs_in_progress") == 1
            request = pb.AppendEventRequest(session_id=session.session.id, event=pb.NewEvent())
            await stub.AppendEvent(request, timeout=TIMEOUT)
            await follow.until_through(1)
            told = scrape(alone.http_address)
            assert told.value("collab_sent_messages_total", kind="follow") == 2
            assert told.value("collab_delivery_lag_seconds_count") == 1

        async def is_over() -> bool:
            told = scrape(alone.http_address)
            cancelled = told.value("collab_rpcs_total", method="ListEvents", code="CANCELLED")
            return cancelled == 1 and told.value("collab_rpcs_in_progress") == 0

        await until(is_over, "the end of the call")


async def test_the_queue(alone: ServeProcess, own_url: str) -> None:
    """Sessions that somebody else holds are seen, and appends that wait; their wait is observed in the end."""
    with (
        grpc.insecure_channel(alone.grpc_address) as channel,
        ThreadPoolExecutor() as threads,
        psycopg.connect(own_url) as holder,
    ):
        stub = CollabServiceStub(channel)
        sessions = [new_session(stub) for _ in range(6)]  # four of which are waited for at once
        holder.execute("SELECT FROM collab_sessions WHERE id = ANY(%s) FOR UPDATE", (sessions,))
        waiting = [threads.submit(append, stub, session_id, json='{"a":1}') for session_id in sessions]

        async def are_held() -> bool:
            told = scrape(alone.http_address)
            queued = told.value("collab_append_queue_appends")
            return (
                told.value("collab_append_held_sessions") == 6
                and queued >= 2
                and told.value("collab_append_queue_bytes") > 7 * queued
            )

        await until(are_held, "the hold")
        holder.rollback()
        assert [append.result(TIMEOUT).event.server_seq for append in waiting] == [1] * 6
        told = scrape(alone.http_address)
        assert told.value("collab_append_queue_appends") == told.value("collab_append_queue_bytes") == 0
        assert told.value("collab_append_transaction_appends_sum") == 6


def appends(told: Scrape) -> dict[tuple[str, str], float]:
    """Return the appends that were counted, by outcome and reason."""
    return {
        (sample.labels["outcome"], sample.labels["reason"]): sample.value
        for sample in told.samples
        if sample.name == "collab_appends_total" and sample.value
    }
