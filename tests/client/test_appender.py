"""The appender: any number of coroutines over one stream, each event stored once, whatever gets lost on the way."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from collab_service.client import (
    Acknowledged,
    Appender,
    CollabClient,
    DeadlineExceeded,
    Event,
    IdempotencyKeyReused,
    InvalidRequest,
    NewEvent,
    RetryPolicy,
    ServerSeqConflict,
    ServiceError,
    SessionNotFound,
    TooLarge,
    Unavailable,
)
from tests.client.calls import ONCE, QUICK
from tests.processes import ServeProcess
from tests.tcp import TcpProxy
from tests.waiting import until


@pytest.fixture
async def appender(client: CollabClient) -> AsyncIterator[Appender]:
    """An appender of the shared server."""
    async with client.appender() as appender:
        yield appender


@pytest.fixture
def restarting(database_url: str, directory: Path) -> Iterator[Callable[[], ServeProcess]]:
    """Start servers, one after the other, on one port."""
    servers: list[ServeProcess] = []

    def start() -> ServeProcess:
        address = servers[0].grpc_address if servers else "127.0.0.1:0"
        server = ServeProcess("--database-url", database_url, "--grpc-address", address, cwd=directory)
        servers.append(server.__enter__())
        return server

    yield start
    for server in servers:
        server.__exit__(None, None, None)


async def new_session(client: CollabClient) -> int:
    """Create a session and return its id."""
    return (await client.create_session()).session.id


async def stored(client: CollabClient, session_id: int) -> list[Event]:
    """Return the whole log."""
    events = [event async for event in client.read(session_id)]
    assert [event.server_seq for event in events] == list(range(1, len(events) + 1))
    return events


async def lose(proxy: TcpProxy, client: CollabClient) -> None:
    """Cut the connection, let none be made, and wait until the client has tried to make one, so that all know of it."""
    proxy.refuse()
    refused = proxy.refused
    proxy.cut()

    async def has_noticed() -> bool:
        with suppress(Unavailable):
            await client.is_serving()
        return proxy.refused > refused

    await until(has_noticed, "an attempt to connect")


def numbered(number: int, key: str | None = None) -> NewEvent:
    """Return an event that can be told from others."""
    return NewEvent(client_seq=number, idempotency_key=key)


def test_it_has_to_be_opened() -> None:
    """Using it outside its context says what to do."""

    async def use() -> None:
        async with CollabClient("127.0.0.1:1") as client:
            with pytest.raises(RuntimeError, match="is not open"):
                await client.appender().append(1, NewEvent())

    asyncio.run(use())


async def test_each_caller_gets_its_own_acknowledgement(client: CollabClient, appender: Appender) -> None:
    """Thousands of coroutines on several sessions: each is told its own event's place, in the order of the calls."""
    sessions = [await new_session(client) for _ in range(5)]
    places = await asyncio.gather(*(appender.append(sessions[n % 5], numbered(n)) for n in range(5_000)))
    for offset, session_id in enumerate(sessions):
        events = await stored(client, session_id)
        assert [event.client_seq for event in events] == list(range(offset, 5_000, 5))
        expected = [Acknowledged(event.server_seq, event.created_at, False) for event in events]
        assert places[offset::5] == expected


async def test_a_lone_event(client: CollabClient, appender: Appender) -> None:
    """It does not wait for company: one after the other, each is stored when its call returns."""
    session_id = await new_session(client)
    for number in range(1, 21):
        assert (await appender.append(session_id, numbered(number))).server_seq == number
        assert (await client.get_session(session_id)).last_server_seq == number


async def test_batches_stay_together(client: CollabClient, appender: Appender) -> None:
    """A batch is stored as neighbours, also when it travels with others."""
    session_id = await new_session(client)
    sizes = [1, 7, 100, 1_000, 3, 1]
    batches = await asyncio.gather(
        *(appender.append_batch(session_id, [numbered(1000 * n + i) for i in range(s)]) for n, s in enumerate(sizes))
    )
    events = await stored(client, session_id)
    assert len(events) == sum(sizes)
    for n, (size, batch) in enumerate(zip(sizes, batches, strict=True)):
        assert batch.last_server_seq == batch.first_server_seq + size - 1
        mine = events[batch.first_server_seq - 1 : batch.last_server_seq]
        assert [event.client_seq for event in mine] == list(range(1000 * n, 1000 * n + size))
        assert {event.created_at for event in mine} == {batch.created_at}
    with pytest.raises(InvalidRequest, match="at least one"):
        await appender.append_batch(session_id, [])
    with pytest.raises(TooLarge):
        await appender.append_batch(session_id, [NewEvent()] * 1_001)


async def test_one_bad_event_is_its_callers_alone(client: CollabClient, appender: Appender) -> None:
    """Of those that travel together, the bad one's caller is told what is wrong; all others are stored, once."""
    session_id = await new_session(client)
    bad = {7: NewEvent(actor_id=""), 13: NewEvent("[]"), 21: NewEvent(type="x" * 300)}
    answers = await asyncio.gather(
        *(appender.append(session_id, bad.get(n) or numbered(n)) for n in range(64)), return_exceptions=True
    )
    for number, field in ((7, "events[0].actor_id"), (13, "events[0].json"), (21, "events[0].type")):
        error = answers[number]
        assert isinstance(error, InvalidRequest)
        assert [violation.field for violation in error.violations] == [field]
        assert error.side_effects == "none"
    assert sorted(e.client_seq or 0 for e in await stored(client, session_id)) == sorted(set(range(64)) - set(bad))
    wrong: dict[str, Any] = {"payload": None, "actor_id": 7, "idempotency_key": ["k"], "client_seq": 2**63}
    for field, value in wrong.items():
        with pytest.raises(InvalidRequest, match=field):
            await appender.append(session_id, NewEvent(**{field: value}))
    with pytest.raises(InvalidRequest, match="session_id"):
        await appender.append("1", NewEvent())  # type: ignore[arg-type]
    with pytest.raises(SessionNotFound):
        await appender.append(10**15, NewEvent())


async def test_callers_own_keys(client: CollabClient, appender: Appender) -> None:
    """Known keys are replays, other content is an error, and both are the caller's own affair."""
    session_id = await new_session(client)
    first = await appender.append(session_id, numbered(1, "k1"))
    again, fresh, same, other, keyless = await asyncio.gather(
        appender.append(session_id, numbered(1, "k1")),
        appender.append(session_id, numbered(2, "k2")),
        appender.append(session_id, numbered(2, "k2")),
        appender.append(session_id, numbered(9, "k1")),
        appender.append(session_id, numbered(3)),
        return_exceptions=True,
    )
    assert again == first._replace(replayed=True)
    assert isinstance(fresh, Acknowledged)
    assert isinstance(same, Acknowledged)
    assert {fresh.replayed, same.replayed} == {False, True}
    assert fresh.server_seq == same.server_seq
    assert isinstance(other, IdempotencyKeyReused)
    assert isinstance(keyless, Acknowledged)
    assert sorted(e.client_seq or 0 for e in await stored(client, session_id)) == [1, 2, 3]


async def test_an_event_without_a_key_is_never_taken_for_one_that_is_stored(
    client: CollabClient, appender: Appender
) -> None:
    """Behind a keyed event that is stored already, together with the same keyless one: that one is new, and stored."""
    session_id = await new_session(client)
    await client.append_batch(session_id, [numbered(1, "a"), numbered(2)])
    replay, new = await asyncio.gather(
        appender.append(session_id, numbered(1, "a")), appender.append(session_id, numbered(2))
    )
    assert (replay.server_seq, replay.replayed) == (1, True)
    assert (new.server_seq, new.replayed) == (3, False)
    assert [e.client_seq for e in await stored(client, session_id)] == [1, 2, 2]


async def test_conditions(client: CollabClient, appender: Appender) -> None:
    """Of many that expect the same number exactly one is stored, right behind it."""
    session_id = await new_session(client)
    answers = await asyncio.gather(
        *(appender.append(session_id, numbered(n), expected_last_server_seq=0) for n in range(20)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [Acknowledged] + [ServerSeqConflict] * 19
    assert len(await stored(client, session_id)) == 1


@pytest.mark.parametrize("seed", range(6))
async def test_cuts_at_random_moments(client: CollabClient, proxy: TcpProxy, seed: int) -> None:
    """Whatever is lost on the way, every event is stored once, and every acknowledgement is true."""
    chance = random.Random(seed)
    session_id = await new_session(client)
    async with CollabClient(proxy.address, retry=QUICK) as cut, cut.appender() as appender:
        places: dict[int, Acknowledged] = {}

        async def write(writer: int) -> None:
            for n in range(25):
                number = 100 * writer + n
                places[number] = await appender.append(session_id, numbered(number))

        writers = asyncio.gather(*(write(writer) for writer in range(20)))
        while not writers.done():
            chance.choice((proxy.cut, proxy.lose_answer, lambda: proxy.cut_after(chance.randrange(1, 3_000))))()
            seen = len(places)

            async def has_moved(seen: int = seen) -> bool:
                return writers.done() or len(places) > seen + chance.randrange(1, 60)

            await until(has_moved, "progress")
        await writers
    events = await stored(client, session_id)
    assert sorted(e.client_seq or 0 for e in events) == sorted(places)
    assert all(events[place.server_seq - 1].client_seq == number for number, place in places.items())
    assert not any(place.replayed for place in places.values())
    for writer in range(20):  # each waited for the one before
        mine = [e.client_seq for e in events if (e.client_seq or 0) // 100 == writer]
        assert mine == sorted(mine, key=lambda number: number or 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_server_is_restarted(restarting: Callable[[], ServeProcess], number: signal.Signals) -> None:
    """Politely or not: writers only notice that it takes longer, and each event is stored once."""
    server = await asyncio.to_thread(restarting)
    async with CollabClient(server.grpc_address, retry=QUICK) as client:
        session_id = await new_session(client)
        done = 0

        async def write(appender: Appender, writer: int) -> None:
            nonlocal done
            for n in range(50):
                await appender.append(session_id, numbered(100 * writer + n))
                done += 1

        async with client.appender() as appender:
            writers = asyncio.gather(*(write(appender, writer) for writer in range(20)))

            async def is_under_way() -> bool:
                return done > 200

            await until(is_under_way, "some appends")
            await asyncio.to_thread(server.stop, number)
            await asyncio.to_thread(restarting)
            await writers
        numbers = [e.client_seq for e in await stored(client, session_id)]
        assert sorted(n or 0 for n in numbers) == [100 * writer + n for writer in range(20) for n in range(50)]


async def test_time_is_up(server: ServeProcess, client: CollabClient, proxy: TcpProxy) -> None:
    """A caller waits no longer than its timeout; the error tells whether the event may be stored."""
    session_id = await new_session(client)
    async with CollabClient(proxy.address, retry=QUICK) as cut, cut.appender() as appender:
        await appender.append(session_id, numbered(1))
        proxy.hold()
        with pytest.raises(DeadlineExceeded) as hung:
            await appender.append(session_id, numbered(2), timeout=0.3)
        assert hung.value.side_effects == "unknown"
        await lose(proxy, cut)
        proxy.release()

        async def is_known_to_be_away() -> bool:
            # The appender's own stream may hear of the cut a moment later, and may have been given the event by then.
            with pytest.raises(Unavailable) as away:
                await appender.append(session_id, numbered(3), timeout=0.5)
            return away.value.side_effects == "none"

        await until(is_known_to_be_away, "an append of which nothing was sent")
        proxy.accept()
        await appender.append(session_id, numbered(4))
    assert [e.client_seq for e in await stored(client, session_id)] in ([1, 2, 4], [1, 4])


async def test_attempts_are_counted(proxy: TcpProxy) -> None:
    """With a policy of one attempt, a cut is told at once."""
    async with CollabClient(proxy.address, retry=ONCE) as cut:
        session_id = await new_session(cut)
        async with cut.appender() as appender:
            proxy.hold()
            writing = asyncio.create_task(appender.append(session_id, NewEvent()))

            async def is_sent() -> bool:
                return proxy.calls >= 2

            await until(is_sent, "the call")
            proxy.cut()
            proxy.release()
            with pytest.raises(Unavailable):
                async with asyncio.timeout(10):
                    await writing

            async def goes_on() -> bool:
                try:
                    return (await appender.append(session_id, NewEvent(), timeout=10)).server_seq >= 1
                except Unavailable:  # its one attempt was made on the connection whose end grpc had not noticed yet
                    return False

            await until(goes_on, "an append on a new connection")


async def test_callers_that_leave(client: CollabClient, proxy: TcpProxy) -> None:
    """Cancelled callers hold nobody up, and what they had not sent is not stored."""
    session_id = await new_session(client)
    async with CollabClient(proxy.address, retry=QUICK) as cut, cut.appender() as appender:
        await appender.append(session_id, numbered(0))
        await lose(proxy, cut)
        tasks = [asyncio.create_task(appender.append(session_id, numbered(n))) for n in range(1, 101)]
        await asyncio.sleep(0)
        for task in tasks[:99]:
            task.cancel()
        await asyncio.wait(tasks[:99])
        assert all(task.cancelled() for task in tasks[:99])
        proxy.accept()
        assert (await tasks[99]).server_seq >= 2
    numbers = [e.client_seq for e in await stored(client, session_id)]
    assert numbers[0] == 0
    assert numbers.count(100) == 1


async def test_a_smaller_limit_of_the_service(database_url: str, directory: Path) -> None:
    """Where the service takes smaller messages than the appender makes, only what is too large by itself fails."""
    with ServeProcess("--database-url", database_url, "--max-message-bytes", "100000", cwd=directory) as server:
        async with CollabClient(server.grpc_address, retry=QUICK) as client, client.appender() as appender:
            session_id = await new_session(client)
            large = NewEvent(b"x" * 150_000)
            answers = await asyncio.gather(
                *(appender.append(session_id, large if n == 5 else numbered(n)) for n in range(30)),
                return_exceptions=True,
            )
            assert isinstance(answers[5], TooLarge)
            assert answers[5].side_effects == "none"
            assert sum(isinstance(answer, Acknowledged) for answer in answers) == 29
            numbers = sorted(event.client_seq or 0 for event in await stored(client, session_id))
            assert numbers == [n for n in range(30) if n != 5]


async def test_memory_is_bounded(client: CollabClient, proxy: TcpProxy) -> None:
    """While nothing gets through, callers wait before their events are taken; then all is stored, once."""
    session_id = await new_session(client)
    async with CollabClient(proxy.address, retry=QUICK) as cut, cut.appender() as appender:
        await appender.append(session_id, numbered(0))
        await lose(proxy, cut)
        payload = b"x" * 100_000
        tasks = [
            asyncio.create_task(appender.append(session_id, NewEvent(payload, client_seq=n))) for n in range(1, 501)
        ]

        async def is_full() -> bool:
            return appender._outbox._waiting_bytes > 15_000_000

        await until(is_full, "a full appender")
        assert appender._outbox._waiting_bytes <= 16 * 2**20
        proxy.accept()
        await asyncio.gather(*tasks)
    assert [e.client_seq async for e in client.read(session_id)] == list(range(501))


async def test_leaving_the_context(client: CollabClient) -> None:
    """It waits for what is under way; when an exception leaves it, it does not, and says so to those who wait."""
    session_id = await new_session(client)
    async with client.appender() as appender:
        tasks = [asyncio.create_task(appender.append(session_id, numbered(n))) for n in range(100)]
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    assert len(await stored(client, session_id)) == 100
    with pytest.raises(RuntimeError, match="not open"):
        await appender.append(session_id, NewEvent())
    with pytest.raises(ZeroDivisionError):
        async with client.appender() as appender:
            late = asyncio.create_task(appender.append(session_id, NewEvent()))
            await asyncio.sleep(0)
            raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        await late


async def test_the_client_is_closed_meanwhile(server: ServeProcess) -> None:
    """Nobody waits for ever."""
    async with CollabClient(server.grpc_address, retry=RetryPolicy(longest_pause=0.05)) as client:
        session_id = await new_session(client)
        appender = await client.appender().__aenter__()
        await appender.append(session_id, NewEvent())
    with pytest.raises((RuntimeError, ServiceError)):
        async with asyncio.timeout(20):
            await appender.append(session_id, NewEvent(), timeout=5)


async def test_a_session_that_is_deleted(client: CollabClient, appender: Appender) -> None:
    """Those who wait for it are told; other sessions go on."""
    gone, other = await new_session(client), await new_session(client)
    await appender.append(gone, NewEvent())
    await client.delete_session(gone)
    answers = await asyncio.gather(
        *(appender.append((gone, other)[n % 2], NewEvent()) for n in range(40)), return_exceptions=True
    )
    assert {type(answer) for answer in answers[::2]} == {SessionNotFound}
    assert {type(answer) for answer in answers[1::2]} == {Acknowledged}
