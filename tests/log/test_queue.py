"""The queue of appends: bounded, fair, in order."""

import asyncio
import random
from contextlib import suppress

import pytest

from collab_service.log.decide import AppendRequest
from collab_service.log.queue import AppendQueue, Pending, Succession
from collab_service.model import NewEvent, QueueLimits
from collab_service.model.errors import DatabaseUnreachable, Overloaded


def pending(session_id: int, size: int = 1, events: int = 1) -> Pending:
    """Return a request with a caller."""
    request = AppendRequest(session_id, [NewEvent()] * events, size)
    return Pending(request, [b""] * events, size, asyncio.get_running_loop().create_future())


def sessions(taken: list[Pending]) -> list[int]:
    """Return the sessions of requests."""
    return [p.request.session_id for p in taken]


def answer(queue: AppendQueue, taken: list[Pending]) -> list[int]:
    """Answer requests that were taken, and return their sessions."""
    for p in taken:
        p.answer.set_result(Overloaded("for a test"))
    queue.settle(taken)
    return sessions(taken)


async def test_sessions_take_turns() -> None:
    """A session with a long line does not keep the others waiting."""
    queue = AppendQueue(QueueLimits())
    busy = [pending(1) for _ in range(6)]
    for p in [*busy, pending(2), pending(3)]:
        queue.put(p)
    assert sessions(queue.take(events=4, size=100, sessions=100)) == [1, 2, 3, 1]
    queue.put(pending(2))
    first_two = queue.take(events=2, size=100, sessions=100)
    assert sessions(first_two) == [1, 2]
    rest = queue.take(events=100, size=100, sessions=100)
    assert [p for p in [*first_two, *rest] if p.request.session_id == 1] == busy[2:]
    assert (len(queue), queue.arrivals.ready) == (0, 0)


async def test_bounds_of_a_transaction() -> None:
    """A transaction is bounded by events, bytes and sessions, but takes at least one request."""
    queue = AppendQueue(QueueLimits())
    for p in [pending(1, size=50), pending(2, size=60, events=3), pending(3)]:
        queue.put(p)
    assert sessions(queue.take(events=100, size=100, sessions=100)) == [1]
    assert sessions(queue.take(events=1, size=1, sessions=1)) == [2]
    assert sessions(queue.take(events=1, size=1, sessions=1)) == [3]


async def test_a_full_queue_refuses() -> None:
    """Too much waiting is refused at once, and a session that is stuck leaves room for the others."""
    queue = AppendQueue(QueueLimits(requests=5, bytes=1_000, session_requests=3, session_bytes=500))
    for _ in range(3):
        queue.put(pending(1))
    with pytest.raises(Overloaded, match="this session"):
        queue.put(pending(1))
    queue.put(pending(2, size=400))
    with pytest.raises(Overloaded, match="this session"):
        queue.put(pending(2, size=101))
    with pytest.raises(Overloaded, match="this server"):
        queue.put(pending(3, size=700))
    queue.put(pending(3))
    with pytest.raises(Overloaded, match="this server"):
        queue.put(pending(4))
    assert len(queue) == 5


async def test_sessions_that_are_stuck_leave_room() -> None:
    """Each of several sessions that take as much as they can leaves as much again: one more finds room."""
    queue = AppendQueue(QueueLimits(requests=1_000, bytes=100_000, session_bytes=25_000))
    for stuck in range(1, 7):
        with pytest.raises(Overloaded, match="this session"):
            while True:
                queue.put(pending(stuck, size=1_000))
        queue.put(pending(100 + stuck, size=1_000))
    assert 90_000 < queue.size < 100_000


@pytest.mark.parametrize("size", [1, 100])
async def test_however_many_are_on_hold(size: int) -> None:
    """Sessions on hold have half of the room together, by number and by size, and one of them half of that at most."""
    queue = AppendQueue(QueueLimits(requests=100, bytes=10_000))

    def fill(session_id: int) -> str:
        with pytest.raises(Overloaded) as refusal:
            while True:
                queue.put(pending(session_id, size=size))
        return str(refusal.value)

    lengths = []
    for stuck in range(1, 50):
        queue.hold(stuck)
        fill(stuck)
        lengths.append(len(queue))
    assert lengths[0] == 25
    assert lengths[-1] == 50
    assert "sessions that are locked" in fill(1)
    assert "this session" in fill(50)
    assert len(queue) == 75


@pytest.mark.parametrize("what", ["answered", "released"])
async def test_waiting_for_what_sessions_on_hold_may_have(what: str) -> None:
    """Who waits for it gets it when something of it is answered, or when a session is no longer on hold."""
    queue = AppendQueue(QueueLimits(requests=2))
    first, second = pending(1), pending(2)
    queue.put(first)
    queue.hold(1)
    queue.hold(2)
    waiting = asyncio.create_task(queue.put_when_there_is_room(second))
    await asyncio.sleep(0)
    assert not second.is_waiting
    if what == "answered":
        assert answer(queue, queue.take_held(1, events=1, size=1)) == [1]
    else:
        queue.release(1)
    await waiting
    assert second.is_waiting


async def test_what_was_taken_keeps_its_room() -> None:
    """What was taken can come back without making the queue fuller than it may be; it gives up its room when answered.

    Otherwise others would take that room meanwhile, and a session that is free would find none.
    """
    queue = AppendQueue(QueueLimits(requests=8, bytes=1_000))
    stuck = [pending(n, size=250) for n in (1, 2, 3)]
    for p in stuck:
        queue.put(p)
    assert queue.take(events=9, size=1_000, sessions=9) == stuck
    assert (len(queue), queue.size, queue.arrivals.ready) == (0, 750, 0)
    with pytest.raises(Overloaded, match="this server"):
        queue.put(pending(4, size=251))
    queue.put_back(stuck[:2])
    queue.hold(1)
    assert answer(queue, stuck[2:]) == [3]
    queue.settle(stuck)  # those that are back wait, and keep their room
    queue.put(pending(4, size=500))
    with pytest.raises(Overloaded, match="this server"):
        queue.put(pending(5))
    assert (len(queue), queue.size, queue.arrivals.ready) == (3, 1_000, 2)


async def test_what_was_taken_of_a_session_counts_for_it() -> None:
    """A session on hold takes no more than its share by being tried again and again, in requests and in bytes."""
    queue = AppendQueue(QueueLimits(requests=100, bytes=2_000, session_requests=3, session_bytes=500))
    first, second = [pending(1, size=10) for _ in range(3)], [pending(2, size=250) for _ in range(2)]
    for p in [*first, *second]:
        queue.put(p)
    for session_id in (1, 2):
        queue.hold(session_id)
    for _ in range(3):
        taken = {1: queue.take_held(1, events=9, size=900), 2: queue.take_held(2, events=9, size=900)}
        assert taken == {1: first, 2: second}
        for session_id in (1, 2):
            with pytest.raises(Overloaded, match="this session"):
                queue.put(pending(session_id))
            queue.put_back(taken[session_id])
    answer(queue, queue.take_held(1, events=1, size=10))
    answer(queue, queue.take_held(2, events=1, size=10))
    for session_id in (1, 2):
        queue.put(pending(session_id))


async def test_the_share_of_a_session_counts_what_is_under_way() -> None:
    """A session whose line was taken as a whole has no new share while that is under way."""
    queue = AppendQueue(QueueLimits(requests=10, session_requests=5))
    for _ in range(5):
        queue.put(pending(1))
    taken = queue.take(events=9, size=9, sessions=9)
    with pytest.raises(Overloaded, match="this session"):
        queue.put(pending(1))
    assert answer(queue, taken) == [1] * 5
    queue.put(pending(1))


async def test_alone() -> None:
    """A request that shall not share a transaction is taken by itself, in its turn, also of a session on hold."""
    queue = AppendQueue(QueueLimits())
    first, alone, last = [pending(n) for n in (1, 2, 3)]
    alone.is_alone = True
    for p in (first, alone, last):
        queue.put(p)
    assert [queue.take(events=9, size=9, sessions=9) for _ in range(3)] == [[first], [alone], [last]]
    queue.put_back([first, alone, last])
    behind = pending(2)
    queue.put(behind)
    queue.hold(2)
    assert [queue.take_held(2, events=9, size=9) for _ in range(2)] == [[alone], [behind]]
    assert sorted(sessions(queue.take(events=9, size=9, sessions=9))) == [1, 3]


async def test_one_request_larger_than_the_bounds_is_taken_when_nothing_waits() -> None:
    """Whatever the limits of a request are set to, it can be served."""
    queue = AppendQueue(QueueLimits(bytes=10, session_bytes=10))
    queue.put(pending(1, size=100))
    assert len(queue.take(events=1, size=1, sessions=1)) == 1


async def test_callers_who_left_give_their_room_back() -> None:
    """A request whose caller has given up is neither taken nor counted."""
    queue = AppendQueue(QueueLimits(session_requests=2))
    first, second = pending(1), pending(1)
    queue.put(first)
    queue.put(second)
    first.answer.cancel()
    queue.remove(first)
    queue.remove(first)
    third = pending(1)
    queue.put(third)
    third.answer.cancel()
    assert queue.take(events=10, size=10, sessions=10) == [second]
    assert (len(queue), queue.arrivals.ready) == (0, 0)


async def test_a_held_session_waits_apart_in_its_order() -> None:
    """What was put off goes back to the front of its line; others are not held up; nothing is lost on the way."""
    queue = AppendQueue(QueueLimits())
    first, second, other = pending(1), pending(1), pending(2)
    queue.put(first)
    queue.put(other)
    assert queue.take(events=10, size=10, sessions=10) == [first, other]
    queue.put(second)
    queue.put_back([first])
    queue.hold(1)
    assert queue.arrivals.ready == 0
    assert queue.take(events=10, size=10, sessions=10) == []
    third = pending(1)
    queue.put(third)
    assert queue.take_held(1, events=2, size=10) == [first, second]
    queue.release(1)
    assert queue.arrivals.ready == 1
    assert queue.take(events=10, size=10, sessions=10) == [third]
    queue.hold(1)
    queue.release(1)
    assert (len(queue), queue.arrivals.ready) == (0, 0)


async def test_waiting_for_a_number_of_requests() -> None:
    """The writer sleeps until there is enough to write."""
    queue = AppendQueue(QueueLimits())
    waiting = asyncio.create_task(queue.arrivals.wait_for(2))
    await asyncio.sleep(0)
    queue.put(pending(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.put(pending(2))
    async with asyncio.timeout(5):
        await waiting


async def test_waiting_for_room() -> None:
    """Who waits for room gets it in turn; one that leaves passes its turn on, and nobody is left behind."""
    queue = AppendQueue(QueueLimits(requests=2))
    for session_id in (1, 9):
        queue.put(pending(session_id))
    waiting = [asyncio.create_task(queue.put_when_there_is_room(pending(2 + n))) for n in range(5)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert answer(queue, queue.take(events=1, size=100, sessions=100)) == [1]
    waiting[0].cancel()  # just when it was its turn
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, True, False, False, False]
    assert answer(queue, queue.take(events=9, size=100, sessions=100)) == [9, 3]
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting[1:4])
        assert answer(queue, queue.take(events=9, size=100, sessions=100)) == [4, 5]
        await waiting[4]
    assert answer(queue, queue.take(events=9, size=100, sessions=100)) == [6]


async def test_waiting_for_room_in_a_session() -> None:
    """Those who wait for one session's line are let in when it is written, dropped or held, and hold up no other."""
    queue = AppendQueue(QueueLimits(session_requests=1))
    queue.put(pending(1))
    waiting = [asyncio.create_task(queue.put_when_there_is_room(pending(1))) for _ in range(3)]
    await asyncio.sleep(0)
    await queue.put_when_there_is_room(pending(2))
    for _ in range(2):
        assert 1 in answer(queue, queue.take(events=9, size=100, sessions=100))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    queue.hold(1)
    async with asyncio.timeout(5):
        while not all(task.done() for task in waiting):
            answer(queue, queue.take_held(1, events=9, size=100))
            await asyncio.sleep(0)
    queue.release(1)
    assert len(queue.take(events=9, size=100, sessions=100)) <= 1


async def test_room_that_one_waiter_cannot_use_is_the_next_ones() -> None:
    """Who is woken and finds the room taken by others of the own session lets the next one have it."""
    queue = AppendQueue(QueueLimits(requests=6, session_requests=3))
    stuck, others = [pending(1) for _ in range(3)], [pending(n) for n in (2, 3, 4)]
    for p in (*stuck, *others):
        queue.put(p)
    queue.take(events=99, size=99, sessions=9)
    queue.put_back(stuck)
    queue.hold(1)
    waiting = [asyncio.create_task(queue.put_when_there_is_room(pending(n))) for n in (1, 1, 7)]
    await asyncio.sleep(0)
    answer(queue, others[:1])
    async with asyncio.timeout(5):
        await waiting[2]
    assert [task.done() for task in waiting] == [False, False, True]
    for task in waiting[:2]:
        task.cancel()


async def test_a_caller_who_leaves_while_its_request_comes_back() -> None:
    """A request whose caller has left after it was put back takes nothing of its session with it."""
    queue = AppendQueue(QueueLimits())
    left, other = pending(1), pending(1)
    queue.put(left)
    taken = queue.take(events=9, size=9, sessions=9)
    queue.put_back(taken)
    left.answer.cancel()
    queue.settle(taken)
    queue.put(other)
    queue.remove(left)
    assert queue.take(events=9, size=9, sessions=9) == [other]


@pytest.mark.parametrize("seed", range(100))
async def test_whatever_happens(seed: int) -> None:
    """Nothing is lost, repeated or out of order, and all room comes back, in any order of events."""
    chances = random.Random(seed)
    queue = AppendQueue(QueueLimits(requests=12, bytes=40, session_requests=6, session_bytes=20))
    orders: dict[int, list[Pending]] = {session_id: [] for session_id in range(4)}
    """What waits, by session."""
    batches: list[list[Pending]] = []
    """What was taken."""
    held: set[int] = set()
    waiting: dict[asyncio.Task[None], Pending] = {}

    async def wait_for_room(request: Pending) -> None:
        await queue.put_when_there_is_room(request)
        orders[request.request.session_id].append(request)

    def new() -> Pending:
        return pending(chances.randrange(4), size=chances.randint(1, 9), events=chances.randint(1, 3))

    def put() -> None:
        request = new()
        with suppress(Overloaded):
            queue.put(request)
            orders[request.request.session_id].append(request)

    def put_later() -> None:
        request = new()
        waiting[asyncio.create_task(wait_for_room(request))] = request

    def take() -> None:
        bounds = {"events": chances.randint(1, 6), "size": chances.randint(1, 20)}
        if held and chances.random() < 0.5:
            taken = queue.take_held(chances.choice(sorted(held)), **bounds)
        else:
            taken = queue.take(**bounds, sessions=chances.randint(1, 4))
        for session_id, order in orders.items():
            mine = [p for p in taken if p.request.session_id == session_id]
            gone = order[: order.index(mine[-1]) + 1] if mine else []
            assert mine == [p for p in gone if p.is_wanted]
            del order[: len(gone)]
            while order and not order[0].is_wanted and not order[0].is_waiting:
                del order[0]  # dropped
        batches.append(taken)

    def finish() -> None:
        batch = batches.pop(chances.randrange(len(batches))) if batches else []
        for request in batch:
            if chances.random() < 0.7 and not request.answer.done():
                request.answer.set_result(Overloaded("for a test"))
        back = [request for request in batch if not request.answer.done()]
        queue.put_back(back)
        for request in reversed(back):
            orders[request.request.session_id].insert(0, request)
            if chances.random() < 0.2:
                request.answer.cancel()
        queue.settle(batch)

    def leave() -> None:
        order = orders[chances.randrange(4)]
        if order:
            request = chances.choice(order)
            request.answer.cancel()
            assert queue.remove(request)
            order.remove(request)
        elif waiting:
            chances.choice(list(waiting)).cancel()

    def hold_or_release() -> None:
        session_id = chances.randrange(4)
        (queue.release if session_id in held else queue.hold)(session_id)
        held.symmetric_difference_update({session_id})

    def check() -> None:
        here = [p for order in orders.values() for p in order]
        assert len(queue) == len(here)
        assert queue.arrivals.ready == sum(
            len(p.request.events) for session_id, order in orders.items() if session_id not in held for p in order
        )
        assert queue.size == sum(p.size for p in {*here, *(p for batch in batches for p in batch)} if p.line)

    for _ in range(120):
        chances.choice([put, put, put_later, take, take, finish, finish, leave, hold_or_release])()
        for _ in range(chances.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
        check()
    for session_id in held:
        queue.release(session_id)
    held.clear()
    for _ in range(500):
        finish()
        take()
        for _ in range(3):
            await asyncio.sleep(0)
        for task in [task for task in waiting if task.done()]:
            del waiting[task]
    assert (len(queue), queue.size, queue.arrivals.ready, len(waiting)) == (0, 0, 0, 0)


async def test_behind_a_fault() -> None:
    """Once a request of a succession was not carried out, those behind it are told so and are not taken."""
    queue = AppendQueue(QueueLimits())
    succession = Succession()
    first, second, other = pending(1), pending(2), pending(3)
    first.succession = second.succession = succession
    for p in (first, second, other):
        queue.put(p)
    assert queue.take(events=1, size=100, sessions=100) == [first]
    first.fail(DatabaseUnreachable())
    assert queue.take(events=9, size=100, sessions=100) == [other]
    assert isinstance(first.answer.exception(), DatabaseUnreachable)
    assert isinstance(second.answer.exception(), DatabaseUnreachable)
