"""`ListEvents` with `follow` at the wire: first messages, limits, errors, and clients that misbehave."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from tests.http2 import FollowConnection
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure
from tests.rpc.follows import Follow, connect
from tests.waiting import until

if TYPE_CHECKING:
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub


@pytest.fixture
async def stub(server: ServeProcess) -> AsyncIterator["CollabServiceAsyncStub"]:
    """A connection to the shared server."""
    async with connect(server.grpc_address) as stub:
        yield stub


async def new_session(stub: "CollabServiceAsyncStub") -> int:
    """Create a session."""
    return (await stub.CreateSession(pb.CreateSessionRequest(), timeout=TIMEOUT)).session.id


async def append(stub: "CollabServiceAsyncStub", session_id: int, count: int = 1, **event: object) -> None:
    """Append some events at once."""
    events = [pb.NewEvent(**event)] * count  # type: ignore[arg-type]
    await stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=events), timeout=TIMEOUT)


async def test_the_first_message_comes_at_once(stub: "CollabServiceAsyncStub") -> None:
    """In an empty session, and at the head: an empty message with the bookmark, before anything is appended."""
    session = await new_session(stub)
    async with Follow(stub, session) as follow:
        await follow.until_through(0, seconds=2)
        await append(stub, session, 2)
        await follow.until_through(2, seconds=2)
    async with Follow(stub, session, 2, types=["none of them"]) as follow:
        await follow.until_through(2, seconds=2)
        assert follow.messages[0].head_server_seq == 2


async def test_a_limit_ends_with_ok(stub: "CollabServiceAsyncStub") -> None:
    """A limit ends the stream: within what is there, exactly there, and later; its bookmark is the last delivered."""
    session = await new_session(stub)
    await append(stub, session, 3, type="a")
    await append(stub, session, 3, type="b")
    async with (
        Follow(stub, session, limit=2) as within,
        Follow(stub, session, limit=6) as there,
        Follow(stub, session, limit=8) as later,
        Follow(stub, session, limit=4, types=["a"]) as filtered,
    ):
        for follow, last in ((within, 2), (there, 6)):
            assert await follow.until_ended() is None
            assert (follow.numbers, follow.through) == (list(range(1, last + 1)), last)
        await later.until_through(6)
        await filtered.until_through(6)
        await append(stub, session, 2, type="b")
        assert await later.until_ended() is None
        assert (later.numbers, later.through) == (list(range(1, 9)), 8)
        await append(stub, session, 5, type="a")
        assert await filtered.until_ended() is None
        assert (filtered.numbers, filtered.through) == ([1, 2, 3, 9], 9)


async def test_errors_at_the_beginning(stub: "CollabServiceAsyncStub") -> None:
    """What a list refuses, a follow refuses as well."""
    session = await new_session(stub)
    for since, session_id, reason in (
        (1, session, "SERVER_SEQ_BEYOND_HEAD"),
        (0, 10**15, "SESSION_NOT_FOUND"),
        (-1, session, "INVALID_REQUEST"),
        (0, 0, "INVALID_REQUEST"),
    ):
        async with Follow(stub, session_id, since) as follow:
            error = await follow.until_ended()
            assert error is not None
            assert Failure(error).reason == reason
            assert not follow.messages


async def test_too_many_followers(database_url: str, directory: Path) -> None:
    """One more than the process accepts is told so, and when to try again; lists are not counted."""
    with ServeProcess("--database-url", database_url, "--max-followers", "2", cwd=directory) as server:
        async with connect(server.grpc_address) as stub:
            session = await new_session(stub)
            async with Follow(stub, session) as one, Follow(stub, session) as two:
                await one.until_through(0)
                await two.until_through(0)
                async with Follow(stub, session) as three:
                    error = await three.until_ended()
                    assert error is not None
                    failed = Failure(error)
                    assert (failed.code, failed.reason) == (
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        "TOO_MANY_FOLLOWERS",
                    )
                    assert failed.retry_seconds > 0
                messages = [m async for m in stub.ListEvents(pb.ListEventsRequest(session_id=session))]
                assert len(messages) == 1
            await until(lambda: _accepted(stub, session), "room for another")


async def _accepted(stub: "CollabServiceAsyncStub", session: int) -> bool:
    async with Follow(stub, session) as follow:
        await follow.until(lambda follow: bool(follow.messages) or follow.ended)
        return not follow.ended


async def test_a_client_that_gives_no_sign_of_life(database_url: str, directory: Path) -> None:
    """A client that answers no pings is cut off and its follow let go; one that is only quiet stays."""
    settings = ("--max-followers", "2", "--keepalive", "1")
    with ServeProcess("--database-url", database_url, *settings, cwd=directory) as server:
        async with connect(server.grpc_address) as stub:
            session = await new_session(stub)
            request = pb.ListEventsRequest(session_id=session, follow=True)
            messages: list[bytes] = []
            async with Follow(stub, session) as quiet:
                await quiet.until_through(0)
                dead = await FollowConnection.open(
                    server.grpc_address, lambda _, message: messages.append(message), answer_pings=False
                )
                dead.follow(request)
                async with asyncio.timeout(20):
                    await dead.closed
                assert len(messages) == 1
                await until(lambda: _accepted(stub, session), "room for another")
                await append(stub, session)
                await quiet.until_through(1)


async def test_a_paused_follower_does_not_hold_up_a_stop(database_url: str, directory: Path) -> None:
    """A follower that takes no more messages keeps a server that stops from stopping for a moment only."""
    with ServeProcess("--database-url", database_url, "--shutdown-grace", "60", cwd=directory) as server:
        async with connect(server.grpc_address) as stub:
            session = await new_session(stub)
            messages: list[bytes] = []
            follows = asyncio.Event()

            def take(_: int, message: bytes) -> None:
                messages.append(message)
                follows.set()

            paused = await FollowConnection.open(server.grpc_address, take, window=10_000)
            paused.follow(pb.ListEventsRequest(session_id=session, follow=True))
            async with asyncio.timeout(60):
                await follows.wait()
            async with Follow(stub, session) as follow:
                for n in range(60):
                    await append(stub, session, binary=b"x" * 2_000)
                    await follow.until_through(n + 1)
            assert 1 <= len(messages) < 60
            started = time.monotonic()
            assert await asyncio.to_thread(server.stop) == 0
            assert time.monotonic() - started < 10
            paused.transport.close()


async def test_a_client_that_leaves_in_the_middle_of_a_message(database_url: str, directory: Path) -> None:
    """Clients that vanish while messages are on their way to them are let go, and so are their places."""
    with ServeProcess("--database-url", database_url, "--max-followers", "3", cwd=directory) as server:
        async with connect(server.grpc_address) as stub:
            session = await new_session(stub)
            await append(stub, session, 100, binary=b"x" * 20_000)
            for _ in range(3):
                first = asyncio.Event()
                connection = await FollowConnection.open(
                    server.grpc_address,
                    lambda *_, first=first: first.set(),
                    window=1_100_000,
                )
                for _ in range(3):
                    connection.follow(pb.ListEventsRequest(session_id=session, follow=True))
                async with asyncio.timeout(10):
                    await first.wait()
                connection.transport.abort()
                await until(lambda: _accepted(stub, session), "room for another")
        assert not [line for line in server.lines if line.get("level") in ("error", "critical")], server.text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
async def test_many_stalled_followers(database_url: str, directory: Path) -> None:
    """Followers that take nothing cost little memory each, however much there is to read."""
    with ServeProcess("--database-url", database_url, cwd=directory) as server:
        async with connect(server.grpc_address) as stub:
            session = await new_session(stub)
            for _ in range(4):
                await append(stub, session, 15, binary=b"x" * 65_000)
            await _stall(server, session, 4)
            before = resident_kilobytes(server.process.pid)
            connections = await _stall(server, session, 300)
            grown = resident_kilobytes(server.process.pid) - before
            assert grown < 300 * 1024
            await append(stub, session)
            for connection in connections:
                connection.transport.abort()


async def _stall(server: ServeProcess, session: int, count: int) -> list[FollowConnection]:
    """Follow many times without ever taking a message, and wait until each has a read behind it."""
    connections = []
    for _ in range(count // 4):
        connection = await FollowConnection.open(server.grpc_address, lambda *_: None, window=100)
        for _ in range(4):
            connection.follow(pb.ListEventsRequest(session_id=session, follow=True))
        connections.append(connection)

    async def all_began() -> bool:
        return sum(connection.begun_streams for connection in connections) == 4 * len(connections)

    await until(all_began, "the first bytes of every follow")
    return connections


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_reader_that_stalls_is_ended(stub: "CollabServiceAsyncStub", server: ServeProcess) -> None:
    """Who has taken no message for 60 s finds the stream ended when they read on."""
    session = await new_session(stub)
    messages: list[bytes] = []
    connection = await FollowConnection.open(
        server.grpc_address, lambda _, message: messages.append(message), window=1_000
    )
    connection.follow(pb.ListEventsRequest(session_id=session, follow=True))
    async with Follow(stub, session) as follow:
        await append(stub, session, 10, binary=b"x" * 50_000)
        await follow.until_through(10)
        await append(stub, session)
        await asyncio.sleep(64)  # which is what is tested
        connection.grow_windows(10_000_000)

        async def ended() -> bool:
            return connection.ended_streams == 1

        await until(ended, "the end of the stalled stream")
        await append(stub, session)
        await follow.until_through(12)
    assert [event for message in messages for event in pb.ListEventsResponse.FromString(message).events][10:] == []
    connection.transport.abort()


@pytest.mark.long
async def test_a_heartbeat_every_ten_seconds(stub: "CollabServiceAsyncStub") -> None:
    """In quiet times an empty message with the bookmark comes every ten seconds."""
    session = await new_session(stub)
    await append(stub, session)
    async with Follow(stub, session) as follow:
        await follow.until_through(1)
        started = time.monotonic()
        await follow.until(lambda follow: len(follow.messages) == 3)
        assert 18 < time.monotonic() - started < 24
        for message in follow.messages[1:]:
            assert (len(message.events), message.through_server_seq, message.head_server_seq) == (0, 1, 1)
