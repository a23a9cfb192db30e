"""Reading and following across cuts: each event once, in order, however often and wherever the connection is lost."""

import asyncio
import itertools
import math
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from collab_service import memory
from collab_service.client import (
    CollabClient,
    Event,
    EventPage,
    NewEvent,
    Overloaded,
    RetryPolicy,
    ServiceError,
    SessionNotFound,
    Unavailable,
    reading,
)
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.client.answering import AnsweringService, Refusal
from tests.client.calls import ONCE, QUICK, failure, serving
from tests.memory import resident_kilobytes, used_bytes
from tests.processes import ServeProcess
from tests.rpc.calls import append, events
from tests.tcp import TcpProxy
from tests.waiting import until

PATIENCE = 60.0
"""Seconds after which a test gives up on what it waits for."""


@dataclass
class Load:
    """Writers at work on a session."""

    session: int
    done: bool = False
    written: int = 0
    """Events so far."""

    async def write(self, client: CollabClient, writer: int) -> None:
        """Append singly and in batches until told that it is enough."""
        for count in itertools.count():
            if self.done:
                return
            event = NewEvent(actor_id=f"writer-{writer}", client_seq=count, type=("even", "odd")[count % 2])
            size = 7 if random.random() < 0.2 else 1
            await client.append_batch(self.session, [event] * size)
            self.written += size


@asynccontextmanager
async def writing(client: CollabClient, writers: int = 3) -> AsyncIterator[Load]:
    """Have writers at work on a new session for the length of the block."""
    load = Load((await client.create_session()).session.id)
    async with asyncio.TaskGroup() as group:
        for writer in range(writers):
            group.create_task(load.write(client, writer), name=f"writer-{writer}")
        try:
            yield load
        finally:
            load.done = True


async def log_of(client: CollabClient, session: int) -> list[Event]:
    """Return a session's events."""
    return [event async for event in client.read(session)]


async def take(follow: AsyncGenerator[Event, None], seen: list[Event], count: int) -> None:
    """Take so many more events."""
    async with asyncio.timeout(PATIENCE):
        for _ in range(count):
            seen.append(await anext(follow))


async def take_until(follow: AsyncGenerator[Event, None], seen: list[Event], holds: Callable[[], bool]) -> None:
    """Take events until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            seen.append(await anext(follow))


async def connected(one: TcpProxy, two: TcpProxy) -> tuple[TcpProxy, TcpProxy]:
    """Wait until one of two proxies has a connection, and return it, and the other."""

    async def only_one() -> bool:
        return one.is_connected() != two.is_connected()

    await until(only_one, "one connection")
    return (one, two) if one.is_connected() else (two, one)


@pytest.mark.parametrize("types", [(), ("even",)], ids=["all", "filtered"])
async def test_cut_at_many_moments(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient, types: tuple[str, ...]
) -> None:
    """However often the connection is cut while others write, in the middle of messages as well, nothing is lost."""
    seen: list[Event] = []
    async with writing(client) as load, aclosing(cut_client.follow(load.session, types=types)) as follow:
        while proxy.cuts < 40:
            await take(follow, seen, random.randint(1, 9))
            if not proxy.will_cut:
                proxy.cut_after(random.choice((1, 10, 100, 1_000, 5_000)))
        load.done = True
        # Whatever comes last, the filter lets it through.
        await client.append(load.session, NewEvent(type="even", actor_id="last"))
        await take_until(follow, seen, lambda: seen[-1].actor_id == "last")
        log = await log_of(client, load.session)
        last = next(event for event in log if event.actor_id == "last").server_seq
    assert seen == [event for event in log if event.server_seq <= last and (not types or event.type in types)]


async def test_two_replicas(client: CollabClient, server: ServeProcess, second_server: ServeProcess) -> None:
    """Of two replicas one is used; when it goes, the follow goes on through the other, there and back."""
    async with TcpProxy(server.grpc_address) as one, TcpProxy(second_server.grpc_address) as two:
        target = f"ipv4:{one.address},{two.address}"
        seen: list[Event] = []
        async with (
            CollabClient(target, retry=QUICK) as replicated,
            writing(client) as load,
            aclosing(replicated.follow(load.session)) as follow,
        ):
            for _ in range(6):
                await take(follow, seen, 20)
                here, there = await connected(one, two)
                there.accept()
                here.refuse()
                here.cut()
                await take_until(follow, seen, there.is_connected)
            load.done = True
            await client.append(load.session, NewEvent(actor_id="last"))
            await take_until(follow, seen, lambda: seen[-1].actor_id == "last")
        assert seen == (await log_of(client, load.session))[: len(seen)]
        assert one.calls >= 3
        assert two.calls >= 3


async def test_a_replica_that_stops(database_url: str, directory: Path) -> None:
    """A server that is stopped in order sends its followers and writers to the other, which miss nothing."""
    seen: list[Event] = []
    arguments = ("--database-url", database_url)
    async with (
        serving(*arguments, cwd=directory) as one,
        serving(*arguments, cwd=directory) as two,
        TcpProxy(one.grpc_address) as to_one,
        TcpProxy(two.grpc_address) as to_two,
    ):
        async with (
            CollabClient(f"ipv4:{to_one.address},{to_two.address}") as client,
            writing(client) as load,
            aclosing(client.follow(load.session)) as follow,
        ):
            await take(follow, seen, 100)
            here, other = await connected(to_one, to_two)
            stop = asyncio.create_task(asyncio.to_thread((one if here is to_one else two).stop))
            await take_until(follow, seen, other.is_connected)
            await take(follow, seen, 100)
            assert await stop == 0
            load.done = True
        async with CollabClient(other.server_address) as client:
            log = await log_of(client, load.session)
            assert len(log) == load.written
            assert seen == log[: len(seen)]


async def test_a_service_that_falls_silent(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which nothing comes any more, not even the heartbeat, is given up and made anew."""
    monkeypatch.setattr(reading, "_SILENCE", 0.5)
    session, _ = await client.create_session()
    async with aclosing(cut_client.follow_pages(session.id)) as follow, asyncio.timeout(PATIENCE):
        await anext(follow)
        proxy.hold()
        await client.append(session.id, NewEvent())
        sent = proxy.calls
        event = asyncio.ensure_future(anext(follow))

        async def has_called_again() -> bool:
            return proxy.calls > sent

        await until(has_called_again, "another call")
        proxy.release()
        assert [e.server_seq for e in (await event).events] == [1]


async def test_attempts_are_counted_anew(proxy: TcpProxy, client: CollabClient) -> None:
    """A bound of attempts is for each time that a follow is cut."""
    session, _ = await client.create_session()
    policy = RetryPolicy(first_pause=0.01, longest_pause=0.1, attempts=8)
    async with (
        asyncio.timeout(PATIENCE),
        CollabClient(proxy.address, retry=policy) as few,
        aclosing(few.follow(session.id)) as follow,
    ):
        for number in range(1, 17):
            await client.append(session.id, NewEvent())
            assert (await anext(follow)).server_seq == number
            proxy.cut()


async def test_catching_up_is_told(client: CollabClient) -> None:
    """A page says how far it reaches, and whether that was all there is."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent(b"x" * 1_000)] * 1000)
    await client.append_batch(session.id, [NewEvent(type="new")] * 200)
    async with aclosing(client.follow_pages(session.id)) as follow, asyncio.timeout(PATIENCE):
        pages = [await anext(follow)]
        while not pages[-1].is_caught_up:
            pages.append(await anext(follow))
        assert len(pages) >= 3
        assert [event.server_seq for page in pages for event in page.events] == list(range(1, 1201))
        assert (pages[-1].through_server_seq, pages[-1].head_server_seq) == (1200, 1200)
        await client.append(session.id, NewEvent(type="newer"))
        page = await anext(follow)
        assert ([event.type for event in page.events], page.is_caught_up) == (["newer"], True)
    async with aclosing(client.follow_pages(session.id, types=["nothing"])) as follow:
        page = await anext(follow)
        while not page.is_caught_up:
            page = await anext(follow)
        assert (page.events, page.through_server_seq) == ((), 1201)


async def test_what_a_filter_leaves_out_is_not_read_again() -> None:
    """After a cut a reader goes on behind all that was looked through, whether it was let through or not."""
    looked = pb.ListEventsResponse(through_server_seq=500, head_server_seq=900)
    cut = Refusal(grpc.StatusCode.UNAVAILABLE)
    found = pb.ListEventsResponse(events=[pb.Event(server_seq=700)], through_server_seq=800, head_server_seq=900)
    rest = pb.ListEventsResponse(through_server_seq=900, head_server_seq=900)
    answers = (looked, cut, found, cut, rest)
    async with AnsweringService(*answers) as service, CollabClient(service.address, retry=QUICK) as client:
        pages = [page async for page in client.read_pages(1, types=["rare"], limit=7)]
    assert [page.through_server_seq for page in pages] == [500, 800, 900]
    requests = [pb.ListEventsRequest.FromString(request) for request in service.requests]
    assert [(request.since_server_seq, request.limit) for request in requests] == [(0, 7), (500, 7), (800, 6)]
    assert all(list(request.types) == ["rare"] and not request.follow for request in requests)


async def test_a_limit_holds_across_cuts(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """So many events come and no more, whatever is cut in between."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent(b"x" * 4_000, type=("a", "b")[n % 2]) for n in range(1000)])
    for method in (cut_client.read, cut_client.follow):
        for types, wanted in (((), list(range(1, 701))), (("b",), list(range(2, 802, 2)))):
            cuts = proxy.cuts
            proxy.cut_after(1_300_000)  # in the second page, of about 1 MiB each
            numbers = [e.server_seq async for e in method(session.id, limit=len(wanted), types=types)]
            assert numbers == wanted
            assert proxy.cuts == cuts + 1


async def test_the_end_of_the_session_ends_it(client: CollabClient) -> None:
    """A session that is deleted ends its follows, with what was there until then."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent()] * 3)
    seen: list[int] = []
    with pytest.raises(SessionNotFound):
        async for event in client.follow(session.id):
            seen.append(event.server_seq)
            if event.server_seq == 3:
                await client.delete_session(session.id)
    assert seen == [1, 2, 3]


async def test_the_session_is_deleted_while_cut_off(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient
) -> None:
    """Who comes back to a session that was deleted meanwhile is told."""
    session, _ = await client.create_session()
    async with aclosing(cut_client.follow_pages(session.id)) as follow, asyncio.timeout(PATIENCE):
        await anext(follow)
        proxy.refuse()
        proxy.cut()
        await client.delete_session(session.id)
        proxy.accept()
        assert type(await failure(anext(follow))) is SessionNotFound


async def test_patience_has_an_end(proxy: TcpProxy, client: CollabClient) -> None:
    """A follow that is given so many seconds to find the service again gives up after them, and not before."""
    loop = asyncio.get_running_loop()
    session, _ = await client.create_session()
    await client.append(session.id, NewEvent())
    async with CollabClient(proxy.address, timeout=0.3, retry=QUICK) as cut_client:
        for patience in (0.0, 0.7):
            proxy.accept()
            async with aclosing(cut_client.follow_pages(session.id, patience=patience)) as follow:
                await anext(follow)
                proxy.refuse()
                proxy.cut()
                cut_at = loop.time()
                async with asyncio.timeout(PATIENCE):
                    error = await failure(anext(follow))
                assert type(error) is Unavailable
                assert patience - 0.25 < loop.time() - cut_at


@pytest.mark.parametrize("patience", [PATIENCE, math.inf])
async def test_patience_begins_anew(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient, patience: float
) -> None:
    """It is for each time that the follow is cut, however often it is."""
    session, _ = await client.create_session()
    async with aclosing(cut_client.follow(session.id, patience=patience)) as follow, asyncio.timeout(PATIENCE):
        for number in range(1, 11, 2):
            await client.append(session.id, NewEvent())
            assert (await anext(follow)).server_seq == number
            event = asyncio.ensure_future(anext(follow))
            refused = proxy.refused
            proxy.refuse()
            proxy.cut()
            await until(lambda refused=refused: _refused(proxy, refused), "a refusal")  # type: ignore[misc]
            proxy.accept()
            await client.append(session.id, NewEvent())
            await event


async def _refused(proxy: TcpProxy, before: int) -> bool:
    return proxy.refused > before


async def test_leaving_ends_the_call(small_server: ServeProcess) -> None:
    """Leaving a read or a follow frees its place on the service at once, although the client stays open."""
    address = small_server.grpc_address
    async with CollabClient(address) as client, CollabClient(address, retry=ONCE) as once:
        session, _ = await client.create_session()
        await client.append_batch(session.id, [NewEvent()] * 3)

        async def is_free() -> bool:
            try:
                async with aclosing(once.follow(session.id)) as follow:
                    return (await anext(follow)).server_seq == 1
            except Overloaded:
                return False

        for _ in range(5):
            async with aclosing(client.follow(session.id)) as follow:
                async for event in follow:
                    if event.server_seq == 2:
                        break
                assert not await is_free()
            await until(is_free, "room for another", seconds=8)
        async with aclosing(client.follow_pages(session.id)) as pages:
            assert len((await anext(pages)).events) == 3
        await until(is_free, "room for another", seconds=8)


async def test_a_reader_that_is_slow(client: CollabClient) -> None:
    """A consumer that takes its time gets everything, however much is appended meanwhile."""
    session, _ = await client.create_session()
    async with aclosing(client.follow(session.id)) as follow:
        await client.append(session.id, NewEvent())
        assert (await anext(follow)).server_seq == 1
        for _ in range(8):
            await client.append_batch(session.id, [NewEvent(b"x" * 40_000)] * 100)
        numbers = [(await anext(follow)).server_seq for _ in range(800)]
    assert numbers == list(range(2, 802))


async def test_a_read_that_is_cut_half_way(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """It goes on where it was, and ends at the head as it was when it began, although more has come meanwhile."""
    session, _ = await client.create_session()
    for _ in range(3):
        await client.append_batch(session.id, [NewEvent(b"x" * 1_000)] * 700)
    proxy.cut_after(1_500_000)
    pages: list[EventPage] = []
    async with aclosing(cut_client.read_pages(session.id)) as read:
        async for page in read:
            pages.append(page)
            if len(pages) == 1:
                await client.append_batch(session.id, [NewEvent()] * 1000)
    assert proxy.cuts == 1
    assert [event.server_seq for page in pages for event in page.events] == list(range(1, 2101))
    assert {page.head_server_seq for page in pages} == {2100}
    assert [page.is_caught_up for page in pages] == [*[False] * (len(pages) - 1), True]
    assert len(await log_of(client, session.id)) == 3100


async def test_a_read_that_cannot_go_on(proxy: TcpProxy, client: CollabClient) -> None:
    """A read gives up after its timeout without progress; what came until then is whole."""
    session, _ = await client.create_session()
    for _ in range(3):
        await client.append_batch(session.id, [NewEvent(b"x" * 1_000)] * 700)
    proxy.cut_after(1_500_000)
    numbers: list[int] = []
    async with CollabClient(proxy.address, retry=RetryPolicy(longest_pause=0.1)) as cut_client:
        with pytest.raises(ServiceError) as caught:
            async for event in cut_client.read(session.id, timeout=1):
                numbers.append(event.server_seq)
                proxy.refuse()
    assert type(caught.value) is Unavailable
    assert 0 < len(numbers) < 2100
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.skipif(not memory.tells_resident_bytes(), reason="the system does not tell")
async def test_leaving_at_the_moment_that_a_message_comes(client: CollabClient, stub: CollabServiceStub) -> None:
    """Nothing of the message stays in the reader's memory."""

    async def leave() -> None:
        session, _ = await client.create_session()
        await client.append(session.id, NewEvent())
        async with aclosing(client.follow(session.id)) as follow:
            await anext(follow)
            waiting = asyncio.create_task(anext(follow))
            for _ in range(10):
                await asyncio.sleep(0)  # it waits
            append(stub, session.id, binary=bytes(1_000_000))
            events(stub, session.id)  # which takes as long as the message does, while nothing here goes on
            waiting.cancel()
            await asyncio.wait((waiting,))

    await leave()
    before = used_bytes()
    for _ in range(40):
        await leave()

    async def is_free() -> bool:
        return used_bytes() - before < 15_000_000

    await until(is_free, "the end of what grpc still held of the messages")


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
async def test_reading_in_bounded_memory(client: CollabClient) -> None:
    """What a reader holds does not grow with the session."""
    session, _ = await client.create_session()
    batch = [NewEvent.of({"text": "x" * 200})] * 1000
    for _ in range(200):
        await client.append_batch(session.id, batch)
    count, before, most = 0, 0, 0
    async for event in client.read(session.id):
        count += 1
        assert event.server_seq == count
        if count == 5_000:
            before = resident_kilobytes(os.getpid())
        if count % 5_000 == 0:
            most = max(most, resident_kilobytes(os.getpid()))
    assert count == 200_000
    assert most - before < 30 * 1024
