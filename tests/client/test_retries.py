"""Trying again: whatever gets lost on the way, an append is stored once, and nothing is repeated that could do harm."""

import asyncio
import statistics
from collections import Counter
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from collab_service.client import (
    END,
    CollabClient,
    DeadlineExceeded,
    NewEvent,
    Overloaded,
    RetryPolicy,
    ServerSeqConflict,
    SessionNotFound,
    Unavailable,
)
from collab_service.client.retry import Backoff
from collab_service.v1 import collab_service_pb2 as pb
from tests.client.answering import AnsweringService, Refusal
from tests.client.calls import ONCE, QUICK, THRICE, failure, serving, unique
from tests.tcp import TcpProxy
from tests.waiting import until

OVERLOADED = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after=0.01)
SHUTTING_DOWN = Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", retry_after=0.01)
COMMIT_OUTCOME_UNKNOWN = Refusal(
    grpc.StatusCode.UNAVAILABLE, "COMMIT_OUTCOME_UNKNOWN", retry_after=0.01, side_effects="unknown"
)


async def attempts_of(proxy: TcpProxy, client: CollabClient) -> int:
    """Have a connection, and lose the next answer on it; return how many calls were sent until then."""

    async def is_connected() -> bool:
        try:
            return await client.is_serving()
        except Unavailable:  # the last cut had not been noticed yet
            return False

    await until(is_connected, "a connection")
    proxy.lose_answer()
    return proxy.calls


@pytest.mark.parametrize("key", [None, "mine"])
async def test_an_append_whose_answer_is_lost(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient, key: str | None
) -> None:
    """It is sent again with the same key and stored once.

    With a key of the client's own that is no replay; with the caller's nobody can know who has stored it.
    """
    session, _ = await client.create_session()
    sent = await attempts_of(proxy, cut_client)
    appended = await cut_client.append(session.id, NewEvent(idempotency_key=key), expected_last_server_seq=0)
    assert (proxy.cuts, proxy.calls - sent) == (1, 2)
    assert appended.replayed == (key is not None)
    assert [event async for event in client.read(session.id)] == [appended.event]
    assert appended.event.idempotency_key
    assert key in (None, appended.event.idempotency_key)
    assert (await cut_client.append(session.id, NewEvent(idempotency_key="next"))).event.server_seq == 2


@pytest.mark.parametrize("key", [None, "mine"])
async def test_a_batch_whose_answer_is_lost(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient, key: str | None
) -> None:
    """The same with a batch, for which one key is enough: the caller's, or one on the first event."""
    session, _ = await client.create_session()
    batch = [NewEvent(client_seq=0), NewEvent(client_seq=1), NewEvent(client_seq=2, idempotency_key=key)]
    sent = await attempts_of(proxy, cut_client)
    appended = await cut_client.append_batch(session.id, batch, expected_last_server_seq=0)
    assert (proxy.cuts, proxy.calls - sent) == (1, 2)
    assert appended.replayed == (key is not None)
    assert (appended.first_server_seq, appended.last_server_seq) == (1, 3)
    stored = [event async for event in client.read(session.id)]
    assert [event.client_seq for event in stored] == [0, 1, 2]
    assert [event.idempotency_key is not None for event in stored] == [key is None, False, key is not None]
    assert (await client.get_session(session.id)).last_server_seq == 3


async def test_an_append_without_a_key_is_sent_once(
    cut_client: CollabClient, proxy: TcpProxy, client: CollabClient
) -> None:
    """Without a key, a lost answer is an error that says that the event may be stored, as it is."""
    session, _ = await client.create_session()
    sent = await attempts_of(proxy, cut_client)
    error = await failure(cut_client.append(session.id, NewEvent(), auto_key=False))
    assert (type(error), error.side_effects, proxy.calls - sent) == (Unavailable, "unknown", 1)
    sent = await attempts_of(proxy, cut_client)
    error = await failure(cut_client.append_batch(session.id, [NewEvent()] * 2, auto_key=False))
    assert (type(error), error.side_effects, proxy.calls - sent) == (Unavailable, "unknown", 1)
    assert [event.server_seq async for event in client.read(session.id)] == [1, 2, 3]


async def test_sessions_whose_answer_is_lost(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """A session with a room is created once, by however many attempts; one without is not asked for again."""
    owner, room = unique("owner"), unique("room")
    sent = await attempts_of(proxy, cut_client)
    session, created = await cut_client.create_session(owner_id=owner, room=room)
    assert (created, proxy.calls - sent) == (False, 2)
    assert await client.get_session(room=room) == session
    sent = await attempts_of(proxy, cut_client)
    error = await failure(cut_client.create_session(owner_id=owner))
    assert (type(error), error.side_effects, proxy.calls - sent) == (Unavailable, "unknown", 1)
    assert len([s async for s in client.list_sessions(owner_id=owner)]) == 2
    sent = await attempts_of(proxy, cut_client)
    touched = await cut_client.touch_session(session.id)
    assert proxy.calls - sent == 2
    assert touched == await client.get_session(session.id)


async def test_a_deletion_whose_answer_is_lost(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """That the session is not there when asked again means that it was deleted; where none was, it is told."""
    session, _ = await client.create_session()
    sent = await attempts_of(proxy, cut_client)
    await cut_client.delete_session(session.id)
    assert proxy.calls - sent == 2
    await failure(client.get_session(session.id))
    assert type(await failure(cut_client.delete_session(session.id))) is SessionNotFound


async def test_a_deletion_of_nothing(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """A session that was not there is no success because the service was away at first: nothing had been sent."""
    session, _ = await client.create_session()
    await client.delete_session(session.id)
    proxy.refuse()
    deletion = asyncio.create_task(cut_client.delete_session(session.id))
    await until_refused(proxy)
    proxy.accept()
    error = await failure(deletion)
    assert (type(error), error.side_effects) == (SessionNotFound, "none")


async def test_removing_a_user_is_sent_once(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """A second attempt would count nothing; the first has taken effect."""
    owner = unique("owner")
    session, _ = await client.create_session(owner_id=owner)
    sent = await attempts_of(proxy, cut_client)
    error = await failure(cut_client.remove_user(owner))
    assert (type(error), error.side_effects, proxy.calls - sent) == (Unavailable, "unknown", 1)
    assert (await client.get_session(session.id)).owner_id is None


async def test_reads_whose_answer_is_lost(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """What only reads is sent again."""
    owner = unique("owner")
    session, _ = await client.create_session(owner_id=owner)
    sent = await attempts_of(proxy, cut_client)
    assert await cut_client.get_session(session.id) == session
    assert proxy.calls - sent == 2
    sent = await attempts_of(proxy, cut_client)
    assert [s async for s in cut_client.list_sessions(owner_id=owner)] == [session]
    assert proxy.calls - sent == 2


async def until_refused(proxy: TcpProxy, times: int = 2) -> None:
    """Wait until somebody has tried in vain to connect."""

    async def refused() -> bool:
        return proxy.refused >= times

    await until(refused, "attempts to connect")


async def test_a_service_that_comes_back(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """Calls wait for a service that is away, whether they could be repeated or not: none had been sent."""
    session, _ = await client.create_session(owner_id=unique("owner"))
    proxy.refuse()
    calls = [
        asyncio.ensure_future(call)
        for call in (
            cut_client.append(session.id, NewEvent(type="with a key")),
            cut_client.append(session.id, NewEvent(type="without"), auto_key=False),
            cut_client.create_session(owner_id=session.owner_id),
            cut_client.touch_session(session.id),
            cut_client.get_session(session.id),
            anext(cut_client.read_pages(session.id)),
            anext(cut_client.follow_pages(session.id)),
        )
    ]
    await until_refused(proxy)
    assert not any(call.done() for call in calls)
    proxy.accept()
    async with asyncio.timeout(20):
        await asyncio.gather(*calls)
    assert sorted([str(event.type) async for event in client.read(session.id)]) == ["with a key", "without"]
    assert len([s async for s in client.list_sessions(owner_id=session.owner_id)]) == 2


async def test_the_timeout_is_kept(proxy: TcpProxy, client: CollabClient) -> None:
    """A call ends with its timeout: the client's, or its own if it has one."""
    loop = asyncio.get_running_loop()
    session, _ = await client.create_session()
    proxy.refuse()

    async def ends_in(seconds: float, call: Awaitable[object]) -> None:
        started = loop.time()
        assert type(await failure(call)) in (Unavailable, DeadlineExceeded)
        assert seconds - 0.25 < loop.time() - started < seconds + 10

    async with CollabClient(proxy.address, timeout=1.0, retry=QUICK) as away:
        await asyncio.gather(
            ends_in(1.0, away.get_session(session.id)),
            ends_in(0.6, away.append(session.id, NewEvent(), timeout=0.6)),
            ends_in(0.6, anext(away.read(session.id, timeout=0.6))),
            ends_in(0.6, anext(away.follow(session.id, timeout=0.6))),
            ends_in(0.6, anext(away.follow(session.id, since=END, timeout=0.6))),
        )


async def test_a_service_that_is_slow_to_greet(cut_client: CollabClient, proxy: TcpProxy) -> None:
    """A connection may take some seconds to come about; it is not given up for another, which would be as slow."""
    proxy.hold()
    call = asyncio.ensure_future(cut_client.create_session())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2.5):  # which is what is tested
            await asyncio.shield(call)
    proxy.release()
    assert (await call).created
    assert proxy.accepted == 1


async def test_how_often_is_bounded(proxy: TcpProxy, client: CollabClient) -> None:
    """With one attempt nothing is sent again, not even what harms nobody; with three, two are."""
    session, _ = await client.create_session()
    async with CollabClient(proxy.address, retry=ONCE) as once:
        follow = once.follow_pages(session.id)
        await anext(follow)
        sent = proxy.calls
        proxy.cut()
        assert type(await failure(anext(follow))) is Unavailable
        assert proxy.calls == sent
        sent = await attempts_of(proxy, once)
        assert type(await failure(once.get_session(session.id))) is Unavailable
        assert proxy.calls - sent == 1
    async with AnsweringService(OVERLOADED) as service, CollabClient(service.address, retry=THRICE) as thrice:
        assert type(await failure(thrice.append(1, NewEvent()))) is Overloaded
        assert service.calls == 3
        assert type(await failure(anext(thrice.follow(1)))) is Overloaded
        assert service.calls == 6


async def test_what_waiting_does_not_help_is_sent_once() -> None:
    """Errors that stay what they are end a call at once."""
    for code, reason in (
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
        (grpc.StatusCode.ABORTED, "SERVER_SEQ_CONFLICT"),
        (grpc.StatusCode.OUT_OF_RANGE, "SERVER_SEQ_BEYOND_HEAD"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
        (grpc.StatusCode.UNIMPLEMENTED, ""),
    ):
        async with AnsweringService(Refusal(code, reason)) as service, CollabClient(service.address) as client:
            await failure(client.append(1, NewEvent()))
            await failure(client.get_session(1))
            await failure(anext(client.follow(1)))
            assert service.calls == 3


async def test_side_effects_speak_for_all_attempts() -> None:
    """After an attempt that may have written, nothing is sent again but what has a key; and no later error hides it."""
    answers = [COMMIT_OUTCOME_UNKNOWN, OVERLOADED, SHUTTING_DOWN]
    async with AnsweringService(*answers) as service, CollabClient(service.address, retry=THRICE) as client:
        error = await failure(client.append(1, NewEvent()))
        assert (type(error), error.reason, error.side_effects) == (Unavailable, "SHUTTING_DOWN", "unknown")
    answers = [OVERLOADED, COMMIT_OUTCOME_UNKNOWN, OVERLOADED]
    async with AnsweringService(*answers) as service, CollabClient(service.address, retry=QUICK) as client:
        error = await failure(client.append(1, NewEvent(), auto_key=False))
        assert (error.reason, error.side_effects, service.calls) == ("COMMIT_OUTCOME_UNKNOWN", "unknown", 2)
    conflict = Refusal(grpc.StatusCode.ABORTED, "SERVER_SEQ_CONFLICT")
    async with AnsweringService(COMMIT_OUTCOME_UNKNOWN, conflict) as service, CollabClient(service.address) as client:
        error = await failure(client.append(1, NewEvent()))
        assert (type(error), error.side_effects, service.calls) == (ServerSeqConflict, "unknown", 2)
    done = pb.AppendEventResponse(event=pb.Event(server_seq=7), replayed=True)
    answers = [OVERLOADED, OVERLOADED]
    async with AnsweringService(*answers, done) as service, CollabClient(service.address) as client:
        appended = await client.append(1, NewEvent(), auto_key=False)
        assert (appended.event.server_seq, appended.replayed, service.calls) == (7, True, 3)


async def test_the_service_says_when_to_come_again() -> None:
    """No attempt is made before the time that the service asked for."""
    answers = [Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", retry_after=0.3)] * 2
    done = pb.GetSessionResponse()
    async with AnsweringService(*answers, done) as service, CollabClient(service.address, retry=QUICK) as client:
        await client.get_session(1)
        first, second, third = service.times
        assert second - first >= 0.3
        assert third - second >= 0.3


def test_pauses() -> None:
    """Pauses double up to a bound, differ from caller to caller, and are never shorter than what was asked for."""
    policy = RetryPolicy(first_pause=0.1, longest_pause=1.0)
    draws = [[Backoff(policy)] for _ in range(2_000)]
    for full in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0):
        pauses = [backoff.next(None) for (backoff,) in draws]
        assert all(pause is not None and full / 2 <= pause <= full for pause in pauses)
        assert statistics.pstdev(pause for pause in pauses if pause is not None) > full / 10
    asked = [pause for (backoff,) in draws if (pause := backoff.next(3.0)) is not None]
    assert len(asked) == len(draws)
    assert all(3.0 <= pause <= 3.75 for pause in asked)
    assert statistics.pstdev(asked) > 0.1
    for (backoff,) in draws:
        backoff.reset()
        pause = backoff.next(0.01)
        assert pause is not None
        assert 0.05 <= pause <= 0.1


def test_pauses_that_are_bounded_from_the_beginning() -> None:
    """A bound below the first pause bounds it as well."""
    pauses = [Backoff(RetryPolicy(first_pause=5, longest_pause=1)).next(None) for _ in range(200)]
    assert all(pause is not None and 0.5 <= pause <= 1 for pause in pauses)


def test_attempts_are_counted() -> None:
    """So many attempts have one pause less between them, each time anew after something has worked."""
    for attempts in (1, 2, 5):
        backoff = Backoff(RetryPolicy(attempts=attempts))
        for _ in range(3):
            pauses = [backoff.next(0.1) for _ in range(attempts + 2)]
            assert [pause is None for pause in pauses] == [False] * (attempts - 1) + [True] * 3
            backoff.reset()


async def test_a_call_that_is_cancelled(cut_client: CollabClient, proxy: TcpProxy, client: CollabClient) -> None:
    """Cancelling a task in the middle of a call, or of a pause, cancels it; the client goes on."""
    session, _ = await client.create_session()
    await cut_client.is_serving()
    for make in (
        lambda: cut_client.append(session.id, NewEvent()),
        lambda: anext(cut_client.read(session.id)),
        lambda: anext(cut_client.follow(session.id)),
        lambda: anext(cut_client.list_sessions()),
    ):
        sent = proxy.calls
        proxy.hold()
        task = asyncio.ensure_future(make())

        async def has_begun(sent: int = sent) -> bool:
            return proxy.calls > sent

        await until(has_begun, "the call")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await make()
        proxy.release()
        assert await cut_client.is_serving()
    proxy.refuse()
    proxy.cut()
    tasks = [asyncio.ensure_future(call) for call in (cut_client.get_session(1), anext(cut_client.follow(1)))]
    await until_refused(proxy)
    for pausing in tasks:
        pausing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pausing
    proxy.accept()
    assert (await cut_client.get_session(session.id)).id == session.id


async def test_a_client_that_is_closed_while_in_use(proxy: TcpProxy, client: CollabClient) -> None:
    """What is under way when the client is closed ends, and does not go on trying."""
    session, _ = await client.create_session()
    async with CollabClient(proxy.address, retry=QUICK) as closing:
        await closing.is_serving()
        follow = closing.follow_pages(session.id)
        await anext(follow)
        sent = proxy.calls
        proxy.hold()
        calls = [asyncio.ensure_future(call) for call in (closing.append(session.id, NewEvent()), anext(follow))]

        async def has_begun() -> bool:
            return proxy.calls > sent

        await until(has_begun, "the append")
    async with asyncio.timeout(20):
        for call in calls:
            with pytest.raises(RuntimeError, match="closed"):
                await call
    proxy.release()


async def test_appends_through_kills(database_url: str, directory: Path) -> None:
    """Writers who only wait: through a service that is killed and started again, each event is stored once, in order.

    A follower sees the same log, without a gap and without a repeat.
    """
    address = "127.0.0.1:0"
    seen: list[int | None] = []
    stop = asyncio.Event()

    async def write(client: CollabClient, session_id: int, actor: str) -> int:
        count = 0
        while not stop.is_set():
            appended = await client.append(session_id, NewEvent(actor_id=actor, client_seq=count), timeout=60)
            assert not appended.replayed
            count += 1
        return count

    async def follow(client: CollabClient, session_id: int) -> None:
        async for event in client.follow(session_id):
            assert event.server_seq == len(seen) + 1
            seen.append(event.client_seq)

    async def until_seen(count: int) -> None:
        async def holds() -> bool:
            assert not follower.done()
            return len(seen) >= count

        await until(holds, f"event {count}", seconds=60)

    async with AsyncExitStack() as stack:
        for turn in range(2):
            async with serving("--database-url", database_url, cwd=directory, grpc_address=address) as server:
                if turn == 0:
                    address = server.grpc_address
                    client = CollabClient(address, retry=RetryPolicy(longest_pause=0.5))
                    await stack.enter_async_context(client)
                    session, _ = await client.create_session()
                    writers = [asyncio.create_task(write(client, session.id, f"writer-{n}")) for n in range(8)]
                    follower = asyncio.create_task(follow(client, session.id))
                await until_seen(len(seen) + 200)
                if turn < 1:
                    server.process.kill()
                    continue
                stop.set()
                counts = await asyncio.gather(*writers)
                log = [event async for event in client.read(session.id)]
                await until_seen(len(log))
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
    assert seen == [event.client_seq for event in log]
    assert len(log) == sum(counts)
    of_each: Counter[str | None] = Counter()
    for event in log:
        assert event.client_seq == of_each[event.actor_id]
        of_each[event.actor_id] += 1
