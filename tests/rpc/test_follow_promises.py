"""What `ListEvents` with `follow` promises, each promise under concurrent appends through two processes."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure
from tests.rpc.follows import Follow, check_bookmarks, connect

if TYPE_CHECKING:
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

BATCH = 7
WRITERS = 6


@dataclass
class Load:
    """Writers at work on a session, through two processes."""

    stubs: list["CollabServiceAsyncStub"]
    session: int
    acknowledged: list[int] = field(default_factory=list)
    """The last number of each append."""
    done: bool = False
    deleted: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def write(self, writer: int, *, only_batches: bool) -> None:
        """Append singly and in batches, until told that it is enough."""
        stub = self.stubs[writer % len(self.stubs)]
        for count in itertools.count():
            if self.done:
                return
            events = [
                pb.NewEvent(actor_id=f"writer-{writer}", client_seq=count, type=random.choice(("even", "odd")))
                for _ in range(BATCH if only_batches or random.random() < 0.3 else 1)
            ]
            request = pb.AppendEventsRequest(session_id=self.session, events=events)
            try:
                answer = await stub.AppendEvents(request, timeout=TIMEOUT)
            except grpc.aio.AioRpcError as error:
                assert self.deleted, error
                return
            self.acknowledged.append(answer.last_server_seq)
            async with self._changed:
                self._changed.notify_all()

    async def until(self, appends: int) -> None:
        """Wait until so many more appends have been acknowledged."""
        wanted = len(self.acknowledged) + appends
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: len(self.acknowledged) >= wanted)

    async def log(self) -> list[pb.Event]:
        """Return the session's events, as they stand in the log."""
        call = self.stubs[0].ListEvents(pb.ListEventsRequest(session_id=self.session), timeout=TIMEOUT)
        return [event async for message in call for event in message.events]


@asynccontextmanager
async def writing(stubs: list["CollabServiceAsyncStub"], *, only_batches: bool = False) -> AsyncIterator[Load]:
    """Have writers at work for the length of the block; after it, all that they have sent is stored."""
    session = (await stubs[0].CreateSession(pb.CreateSessionRequest(), timeout=TIMEOUT)).session.id
    load = Load(stubs, session)
    writers = [asyncio.create_task(load.write(n, only_batches=only_batches)) for n in range(WRITERS)]
    try:
        yield load
    finally:
        load.done = True
        await asyncio.gather(*writers)


@pytest.fixture
async def stubs(server: ServeProcess, second_server: ServeProcess) -> AsyncIterator[list["CollabServiceAsyncStub"]]:
    """A connection to each of two processes."""
    async with connect(server.grpc_address) as one, connect(second_server.grpc_address) as other:
        yield [one, other]


async def follow_through_load(stubs: list["CollabServiceAsyncStub"]) -> tuple[list[Follow], list[pb.Event]]:
    """Follow a session through both processes while it is written to; return the follows and the log at the end."""
    async with AsyncExitStack() as stack:
        async with writing(stubs) as load:
            follows = [await stack.enter_async_context(Follow(stub, load.session)) for stub in stubs * 3]
            await load.until(300)
        log = await load.log()
        for follow in follows:
            await follow.until_through(len(log))
    return follows, log


async def test_ordered(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Ordered: every follower gets the events in the order of their numbers, which is that of the log."""
    follows, log = await follow_through_load(stubs)
    for follow in follows:
        assert follow.numbers == sorted(follow.numbers)
        assert follow.events == log


async def test_unique(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Unique: no follower gets an event twice."""
    follows, _ = await follow_through_load(stubs)
    for follow in follows:
        assert len(set(follow.numbers)) == len(follow.numbers)
        assert len({event.id for event in follow.events}) == len(follow.events)
        check_bookmarks(follow)


async def test_gap_free(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Gap-free: wherever and whenever a follower begins, nothing is lost where catching up turns into following."""
    async with AsyncExitStack() as stack:
        async with writing(stubs) as load:
            await load.until(20)
            follows = []
            for n in range(60):
                last = load.acknowledged[-1]
                since = (0, last // 2, max(load.acknowledged), last)[n % 4]
                follows.append(await stack.enter_async_context(Follow(stubs[n % 2], load.session, since)))
                await load.until(5)
        log = await load.log()
        for follow in follows:
            await follow.until_through(len(log))
            assert follow.numbers == list(range(follow.since + 1, len(log) + 1))


async def test_atomic(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Atomic: `head_server_seq` is always the end of an append, also where a message or a limit splits a batch."""
    async with AsyncExitStack() as stack:
        async with writing(stubs, only_batches=True) as load:
            follows = [
                await stack.enter_async_context(Follow(stub, load.session, limit=limit))
                for stub in stubs
                for limit in (0, 100, 101)
            ]
            await load.until(150)
        log = await load.log()
        for follow in follows:
            await follow.until_through(len(log) if follow.numbers[-1] > 101 else 100)
            assert {message.head_server_seq % BATCH for message in follow.messages} == {0}


async def test_resumable(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Resumable: cut at any message, going on from the last number seen, through another process."""
    async with writing(stubs) as load:
        seen: list[pb.Event] = []
        for cut in range(40):
            last = seen[-1].server_seq if seen else 0
            async with Follow(stubs[cut % 2], load.session, last) as follow:
                await follow.until(lambda follow, n=1 + cut % 5: len(follow.messages) >= n)  # type: ignore[misc]
                seen += follow.events
    log = await load.log()
    assert seen == log[: len(seen)]
    assert len(seen) > 40


@pytest.mark.parametrize("types", [["even"], ["odd", "none of them"], ["none of them"]])
async def test_bookmarkable(stubs: list["CollabServiceAsyncStub"], types: list[str]) -> None:
    """Bookmarkable: everything that matches up to `through` has come, and the head is reached in the end."""
    async with AsyncExitStack() as stack:
        async with writing(stubs) as load:
            follows = [await stack.enter_async_context(Follow(stub, load.session, types=types)) for stub in stubs * 2]
            await load.until(200)
            follows += [
                await stack.enter_async_context(Follow(stub, load.session, load.acknowledged[-1], types=types))
                for stub in stubs
            ]
            await load.until(50)
        log = await load.log()
        for follow in follows:
            await follow.until_through(len(log))
            check_bookmarks(follow)
            assert follow.messages[-1].head_server_seq == len(log)
            matching = [event for event in log if event.type in types and event.server_seq > follow.since]
            assert follow.events == matching
            delivered = 0
            for message in follow.messages:
                delivered += len(message.events)
                assert [e.server_seq for e in matching[delivered:]][:1] > [message.through_server_seq] or (
                    delivered == len(matching)
                )


async def test_ending_when_the_session_is_deleted(stubs: list["CollabServiceAsyncStub"]) -> None:
    """Ending: a deleted session ends its follows with NOT_FOUND through every process, and only its own."""
    async with AsyncExitStack() as stack:
        async with writing(stubs) as load, writing(stubs) as other:
            follows = [await stack.enter_async_context(Follow(stub, load.session)) for stub in stubs * 2]
            unharmed = [await stack.enter_async_context(Follow(stub, other.session)) for stub in stubs]
            await load.until(50)
            load.deleted = True
            await stubs[0].DeleteSession(pb.DeleteSessionRequest(session_id=load.session), timeout=TIMEOUT)
            for follow in follows:
                error = await follow.until_ended()
                assert error is not None
                failed = Failure(error)
                assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
                assert follow.numbers == list(range(1, len(follow.numbers) + 1))
            await other.until(50)
        for follow in unharmed:
            await follow.until_through(len(await other.log()))


async def test_ending_when_the_server_stops(database_url: str, directory: Path) -> None:
    """Ending: a server that stops ends its follows with SHUTTING_DOWN, under load, and they go on elsewhere."""
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as stopping,
        ServeProcess("--database-url", database_url, cwd=directory) as staying,
    ):
        async with (
            connect(stopping.grpc_address) as one,
            connect(staying.grpc_address) as other,
            AsyncExitStack() as stack,
        ):
            async with writing([other]) as load:
                follows = [await stack.enter_async_context(Follow(one, load.session)) for _ in range(5)]
                await load.until(50)
                assert await asyncio.to_thread(stopping.stop) == 0
                for follow in follows:
                    error = await follow.until_ended()
                    assert error is not None
                    failed = Failure(error)
                    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
                    assert failed.retry_seconds > 0
                    assert failed.metadata["side_effects"] == "none"
            log = await load.log()
            for follow in follows:
                async with Follow(other, load.session, follow.numbers[-1]) as rest:
                    await rest.until_through(len(log))
                    assert follow.events + rest.events == log
