"""Much more than can be carried: what can be is, the rest is refused at once, and nothing grows."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import psycopg
import pytest

from collab_service.model import QueueLimits
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure, append, events, new_session
from tests.scrapes import scrape
from tests.waiting import until

_APPEND = "/collab_service.v1.CollabService/AppendEvent"
_LARGE = 1024 * 1024
_CALLERS = 200
_MOST_OF_A_SESSION = QueueLimits().session_requests
_GROWTH_MB = 350
"""Without a bound, it is a gigabyte here; the process keeps some of what it has once had."""


def _call(channel: grpc.aio.Channel) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    return channel.unary_unary(_APPEND)


async def _append(channel: grpc.aio.Channel, request: bytes) -> pb.AppendEventResponse | Failure:
    try:
        return pb.AppendEventResponse.FromString(await _call(channel)(request, timeout=TIMEOUT))
    except grpc.aio.AioRpcError as error:
        return Failure(error)


async def _reason(call: "grpc.aio.StreamUnaryCall[bytes, bytes]") -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Failure(caught.value).reason


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


async def test_more_than_there_is_memory_for(server: ServeProcess, stub: CollabServiceStub) -> None:
    """Large appends all at once are stored or refused with OVERLOADED, of which nothing is stored; the memory stays.

    Meanwhile an append to another session gets through, if need be when it is tried again.
    """
    session_id, other = new_session(stub), new_session(stub)
    append(stub, other)
    event = pb.NewEvent(binary=bytes(_LARGE))
    request = pb.AppendEventRequest(session_id=session_id, event=event).SerializeToString()
    small = pb.AppendEventRequest(session_id=other).SerializeToString() + b"\x12\x00"
    before = resident_kilobytes(server.process.pid)
    async with _channel(server.grpc_address) as one, _channel(server.grpc_address) as two:
        calls = [asyncio.create_task(_append(channel, request)) for channel in (one, two) for _ in range(_CALLERS // 2)]

        async def gets_through() -> bool:
            outcome = await _append(two, small)
            assert not isinstance(outcome, Failure) or outcome.reason == "OVERLOADED"
            return not isinstance(outcome, Failure)

        await until(gets_through, "an append to another session")
        outcomes = await asyncio.gather(*calls)
    growth = (resident_kilobytes(server.process.pid) - before) / 1024
    refused = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    stored = [outcome.event.server_seq for outcome in outcomes if isinstance(outcome, pb.AppendEventResponse)]
    assert {(failure.reason, failure.metadata["side_effects"]) for failure in refused} == {("OVERLOADED", "none")}
    assert all(0 < failure.retry_seconds < 1 for failure in refused)
    assert sorted(stored) == list(range(1, len(stored) + 1))
    assert len(stored) >= 8  # a transaction's worth
    assert [event.server_seq for event in events(stub, session_id)] == sorted(stored)
    assert growth < _GROWTH_MB
    append(stub, session_id)


async def test_a_database_that_stands_still(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """What waits is bounded and the rest is refused at once; deadlines hold in the queue; then everything goes on."""
    session_id, other = new_session(stub), new_session(stub)
    append(stub, session_id)
    request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent(type="flood")).SerializeToString()
    late = pb.AppendEventRequest(session_id=other, event=pb.NewEvent(type="late")).SerializeToString()
    patient = pb.AppendEventRequest(session_id=other, event=pb.NewEvent(type="patient")).SerializeToString()
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(server_database_url))
        await connection.execute("LOCK TABLE collab_events IN ACCESS EXCLUSIVE MODE")
        channels = [await stack.enter_async_context(_channel(server.grpc_address)) for _ in range(2)]
        flood = [asyncio.create_task(_append(channels[n % 2], request)) for n in range(_MOST_OF_A_SESSION + 600)]

        async def are_refused() -> bool:
            return sum(task.done() for task in flood) >= 400

        await until(are_refused, "refusals while the database stands still")
        refused = [task.result() for task in flood if task.done()]
        assert {outcome.reason for outcome in refused if isinstance(outcome, Failure)} == {"OVERLOADED"}
        assert all(isinstance(outcome, Failure) for outcome in refused)
        # One session's flood leaves room for the others.
        waiting = asyncio.create_task(_append(channels[0], patient))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channels[0])(late, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await connection.rollback()
        outcomes = await asyncio.gather(*flood)
        assert isinstance(await waiting, pb.AppendEventResponse)
    stored = sum(isinstance(outcome, pb.AppendEventResponse) for outcome in outcomes)
    assert len(events(stub, session_id)) == 1 + stored
    assert [event.type for event in events(stub, other)] == ["patient"]


async def test_appends_by_the_thousand_are_in_nobody_elses_way(server: ServeProcess, stub: CollabServiceStub) -> None:
    """Other calls do not wait behind those that came before them and have not begun, even on the same connection."""
    session_id = new_session(stub)
    request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent()).SerializeToString()
    async with _channel(server.grpc_address) as channel:
        await channel.channel_ready()
        server.process.send_signal(signal.SIGSTOP)
        try:
            appends = [_call(channel)(request) for _ in range(1_000)]
            behind = CollabServiceStub(channel).GetSession(pb.GetSessionRequest(session_id=session_id))
            for _ in range(10):
                await asyncio.sleep(0)  # all of them begin, in this order
        finally:
            server.process.send_signal(signal.SIGCONT)
        stored_before = (await behind).session.last_server_seq
        await asyncio.gather(*appends)
    assert stored_before < 500
    assert events(stub, session_id)[-1].server_seq == 1_000


async def test_requests_that_never_come(server: ServeProcess, stub: CollabServiceStub) -> None:
    """Hundreds of calls that have begun and send no request are in nobody's way; thousands only for a moment."""
    session_id = new_session(stub)
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with _channel(server.grpc_address) as channel:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(_APPEND)
        begun = [call(nothing()) for _ in range(600)]
        append(stub, session_id)
        begun += [call(nothing()) for _ in range(900)]

        async def are_told() -> bool:
            return sum(each.done() for each in begun) >= told

        # No more than so many are waited for. The rest is told.
        told = len(begun) - 1_024
        await until(are_told, "refusals")

        async def gets_through() -> bool:
            try:
                append(stub, session_id)
            except grpc.RpcError as error:
                assert Failure(error).reason == "OVERLOADED"
                return False
            return True

        await until(gets_through, "an append beside them", seconds=4)
        told += 1
        await until(are_told, "the end of one that has made room for it")
        assert {await _reason(each) for each in begun if each.done()} == {"OVERLOADED"}
        for each in begun:
            each.cancel()
    assert [event.server_seq for event in events(stub, session_id)] == [1, 2]


async def test_calls_that_are_given_up_by_the_hundred(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """They do not flood the log: at most 20 lines a second tell of them, and say how many there were."""
    session_id = new_session(stub)
    request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent()).SerializeToString()
    seen = len(server.lines)

    def lines() -> list[int]:
        return [line["calls"] for line in server.lines[seen:] if line.get("event") == "call was cancelled"]

    async with _channel(server.grpc_address) as channel:

        async def give_up(count: int) -> None:
            calls = [_call(channel)(request) for _ in range(count)]

            async def have_come() -> bool:
                return scrape(server.http_address).value("collab_rpcs_in_progress") >= count

            await until(have_come, f"{count} calls in progress")
            for call in calls:
                call.cancel()
            assert {await call.code() for call in calls} == {grpc.StatusCode.CANCELLED}

        async def all_are_told_of() -> bool:
            await give_up(1)
            return sum(lines()) >= 250

        async with await psycopg.AsyncConnection.connect(server_database_url) as connection:
            await connection.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
            started = time.monotonic()
            await give_up(250)
            await until(all_are_told_of, "lines")
            assert len(lines()) <= 20 * (time.monotonic() - started + 2)


async def test_calls_that_fail_by_the_thousand(database_url: str, directory: Path) -> None:
    """They do not flood the log either, where 100 lines a second tell of them."""
    request = pb.GetSessionRequest(session_id=2**62)
    with ServeProcess("--database-url", database_url, cwd=directory) as server:  # whose lines nobody else waits for

        def lines() -> list[int]:
            return [line["calls"] for line in server.lines if line.get("event") == "call failed"]

        async with _channel(server.grpc_address) as channel:
            get = CollabServiceStub(channel).GetSession

            async def fail(count: int) -> None:
                calls = [get(request) for _ in range(count)]
                assert {await call.code() for call in calls} == {grpc.StatusCode.NOT_FOUND}

            async def all_are_told_of() -> bool:
                await fail(1)
                return sum(lines()) >= 1_000

            started = time.monotonic()
            await fail(1_000)
            await until(all_are_told_of, "lines")
            assert len(lines()) <= 100 * (time.monotonic() - started + 2)


async def test_sessions_that_are_stuck_with_large_appends(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """Sessions that somebody has locked take only so much of what may wait: appends to another are never refused."""
    stuck, other = [new_session(stub) for _ in range(5)], new_session(stub)
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(server_database_url))
        await connection.execute("SELECT id FROM collab_sessions WHERE id = ANY(%s) FOR UPDATE", (stuck,))
        channels = [await stack.enter_async_context(_channel(server.grpc_address)) for _ in stuck]
        calls = []
        for channel, session_id in zip(channels, stuck, strict=True):
            event = pb.NewEvent(binary=bytes(_LARGE))
            request = pb.AppendEventRequest(session_id=session_id, event=event).SerializeToString()
            calls += [asyncio.create_task(_append(channel, request)) for _ in range(24)]

        async def have_all_come() -> bool:
            refused = sum(task.done() for task in calls)
            return refused + scrape(server.http_address).value("collab_rpcs_in_progress") == len(calls)

        await until(have_all_come, "all requests, which wait or are refused")
        assert sum(task.done() for task in calls) >= len(calls) / 2
        for number in range(1, 21):
            assert append(stub, other).event.server_seq == number
        await connection.rollback()
        outcomes = await asyncio.gather(*calls)
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Failure)} == {"OVERLOADED"}
    stored = sum(isinstance(outcome, pb.AppendEventResponse) for outcome in outcomes)
    assert sum(len(events(stub, session_id)) for session_id in stuck) == stored


async def test_streams_that_hold_too_much(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """What streams of appends hold together is bounded: one that comes with more ends with OVERLOADED."""
    session_id, other = new_session(stub), new_session(stub)
    request = pb.AppendEventsRequest(session_id=session_id, events=[pb.NewEvent(binary=bytes(_LARGE - 1_000))])
    message = pb.AppendStreamRequest(request_number=1, request=request)
    before = resident_kilobytes(server.process.pid)

    async def append_through(channel: grpc.aio.Channel) -> str:
        call = CollabServiceStub(channel).AppendStream()
        try:
            await call.write(message)
            await call.done_writing()
            answers = [answer.HasField("response") async for answer in call]
        except grpc.aio.AioRpcError as error:
            return Failure(error).reason
        assert answers == [True]
        return "stored"

    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(server_database_url))
        await connection.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        channels = [await stack.enter_async_context(_channel(server.grpc_address)) for _ in range(4)]
        streams = [asyncio.create_task(append_through(channels[n % 4])) for n in range(200)]

        async def are_refused() -> bool:
            return sum(task.done() for task in streams) >= 100

        await until(are_refused, "refusals")
        append(stub, other)
        await connection.rollback()
        outcomes = await asyncio.gather(*streams)
    growth = (resident_kilobytes(server.process.pid) - before) / 1024
    assert set(outcomes) == {"OVERLOADED", "stored"}
    assert len(events(stub, session_id)) == outcomes.count("stored") >= 32
    assert growth < _GROWTH_MB
