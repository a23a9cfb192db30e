"""The tail: what is kept in memory of a followed session, and how it is handed out."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_service.log.tail import Tail
from collab_service.model import Event, NewEvent
from collab_service.model.errors import ShuttingDown
from tests.log.logs import unseen
from tests.waiting import until


def events(first: int, last: int, payload: str = "{}") -> list[Event]:
    """Return events with these numbers."""
    return [Event(n, 1, n, n, b"", NewEvent(payload=payload)) for n in range(first, last + 1)]


def numbers_after(tail: Tail, position: int) -> list[int] | None:
    """Return the numbers that the tail hands to somebody at a position."""
    page = tail.after(position)
    return None if page is None else [event.server_seq for event in page.events]


@pytest.fixture
async def tail() -> Tail:
    """A tail of a session whose head was found to be 10, with a follower."""
    tail = Tail(1, 1024 * 1024, unseen().follows)
    tail.followers = 1
    tail.learn(10)
    return tail


async def test_events_that_continue_it(tail: Tail) -> None:
    """What continues the tail is handed out from any number on; what lies before it is in the table."""
    tail.feed(events(11, 13), 13)
    await until_handed_out(tail, 13)
    assert numbers_after(tail, 9) is None
    assert numbers_after(tail, 10) == [11, 12, 13]
    assert numbers_after(tail, 12) == [13]
    assert numbers_after(tail, 13) == []
    assert not tail.is_behind


async def test_events_that_have_come_before(tail: Tail) -> None:
    """Events that come twice, as from this process and from the table, are handed out once."""
    tail.feed(events(11, 13), 13)
    tail.feed(events(11, 15), 15)
    tail.feed(events(12, 14), 15)
    await until_handed_out(tail, 15)
    assert numbers_after(tail, 10) == [11, 12, 13, 14, 15]


async def test_events_that_leave_a_gap(tail: Tail) -> None:
    """Events behind a gap are not handed out; the tail knows that it is behind until the gap is filled."""
    tail.feed(events(14, 15), 15)
    assert tail.reached < tail.head
    assert (tail.head, numbers_after(tail, 10)) == (15, [])
    tail.feed(events(11, 15), 15)
    await until_handed_out(tail, 15)
    assert not tail.is_behind
    assert numbers_after(tail, 10) == [11, 12, 13, 14, 15]


async def test_events_with_a_gap_among_them(tail: Tail) -> None:
    """Events that are no neighbours are not handed out either, not even those before the gap."""
    tail.feed([*events(11, 12), *events(14, 15)], 15)
    await asyncio.sleep(0)
    assert (tail.head, tail.is_behind, numbers_after(tail, 10)) == (15, True, [])
    tail.feed(events(11, 15), 15)
    await until_handed_out(tail, 15)
    assert numbers_after(tail, 10) == [11, 12, 13, 14, 15]


async def test_an_event_before_the_head_was_found() -> None:
    """An event that is committed while a follower looks up the head is in the tail."""
    tail = Tail(1, 1024 * 1024, unseen().follows)
    tail.followers = 1
    tail.feed(events(11, 11), 11)
    tail.learn(10)
    await until_handed_out(tail, 11)
    assert numbers_after(tail, 10) == [11]


async def test_memory_is_bounded() -> None:
    """The oldest is let go first, and the newest kept whatever its size."""
    tail = Tail(1, 100_000, unseen().follows)
    tail.followers = 1
    tail.learn(0)
    for n in range(1, 31):
        tail.feed(events(n, n, "x" * 10_000), n)
        await until_handed_out(tail, n)
    assert numbers_after(tail, 0) is None
    kept = [n for n in range(30) if numbers_after(tail, n) is not None]
    assert kept == list(range(kept[0], 30))
    assert 3 <= len(kept) <= 5
    tail.feed(events(31, 31, "x" * 200_000), 31)
    await until_handed_out(tail, 31)
    assert numbers_after(tail, 30) == [31]
    assert numbers_after(tail, 29) is None
    tail.forget(asyncio.get_running_loop().time() + 1, 100_000)
    assert numbers_after(tail, 30) is None
    assert numbers_after(tail, 31) == []


async def test_messages_are_bounded(tail: Tail) -> None:
    """What is handed out at once fits into a message: 500 events and 1 MiB, but for a single larger event."""
    tail.max_bytes = 100 * 1024 * 1024
    tail.feed([*events(11, 1_500), *events(1_501, 1_510, "x" * 300_000), *events(1_511, 1_511, "x" * 2_000_000)], 1_511)
    await until_handed_out(tail, 1_511)
    position, counts = 10, []
    while (page := tail.after(position)) is not None and page.count:
        parts = page.events
        assert [event.server_seq for event in parts] == list(range(position + 1, position + 1 + len(parts)))
        assert len(parts) <= 500
        assert sum(len(event.content.payload) for event in parts) <= 1_048_576 or len(parts) == 1
        position += len(parts)
        counts.append(len(parts))
    assert position == 1_511
    assert len(counts) < 10


async def test_messages_are_bounded_in_bytes(tail: Tail) -> None:
    """What counts are the bytes of UTF-8, of every field."""
    content = NewEvent("é" * 120, None, "t" * 255, "😀" * 3_000, "h" * 255, b"s" * 1_024, "k" * 255)
    tail.max_bytes = 100 * 1024 * 1024
    tail.feed([Event(n, 1, n, n, b"", content) for n in range(11, 211)], 210)
    await until_handed_out(tail, 210)
    found = tail.after(10)
    assert found is not None
    assert found.count == 1_048_576 // (240 + 255 + 12_000 + 255 + 1_024 + 255)


async def test_readers_with_many_different_filters(tail: Tail) -> None:
    """What filters leave is kept for the first few of them only, so that many take no memory."""
    tail.feed(events(11, 13), 13)
    await until_handed_out(tail, 13)
    page = tail.after(10)
    assert page is not None
    (chunk,) = page.chunks
    parts = [chunk.of_types(frozenset({str(n)})) for n in range(100)]
    kept = [part is chunk.of_types(frozenset({str(n)})) for n, part in enumerate(parts)]
    assert 0 < sum(kept) < 20


async def test_shared(tail: Tail) -> None:
    """Everybody at the same place gets the same chunk, also those who ask for the same types."""
    tail.feed(events(11, 13), 13)
    await until_handed_out(tail, 13)
    one, other = tail.after(10), tail.after(10)
    assert one is not None
    assert other is not None
    assert one.chunks[0] is other.chunks[0]
    assert one.chunks[0].of_types(frozenset("ab")) is other.chunks[0].of_types(frozenset("ba"))


async def test_waiting(tail: Tail) -> None:
    """Whoever waits is woken by an event, by the end, or after a while; nobody is left in memory."""
    waiting = asyncio.create_task(tail.turn(10, 60))
    await asyncio.sleep(0)
    tail.feed(events(11, 11), 11)
    await waiting
    await tail.turn(11, 0.01)
    left = asyncio.create_task(tail.turn(11, 60))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    assert not tail._waiting
    await tail.turn(10, 60)
    waiting = asyncio.create_task(tail.turn(11, 60))
    await asyncio.sleep(0)
    tail.end(ShuttingDown())
    await waiting
    with pytest.raises(ShuttingDown):
        tail.check()
    await tail.turn(11, 60)


async def test_what_comes_between_turns(tail: Tail) -> None:
    """Where deliveries take long, what comes meanwhile, and for a while after, is handed out together."""

    taking = asyncio.create_task(take_long_over_a_turn(tail))
    await asyncio.sleep(0)
    tail.feed(events(11, 11), 11)
    tail.feed(events(12, 12), 12)
    assert numbers_after(tail, 10) == [11]
    await taking
    for n in range(13, 21):
        tail.feed(events(n, n), n)
        await asyncio.sleep(0)
    assert numbers_after(tail, 10) == [11]
    await until_handed_out(tail, 20)
    found = tail.after(11)
    assert found is not None
    assert [len(chunk.events) for chunk in found.chunks] == [9]


async def test_turns(tail: Tail) -> None:
    """Many followers have their turn a few at a time, the longest-waiting first, and get all there is by then."""
    took: list[tuple[int, list[int]]] = []

    async def follow(number: int) -> None:
        position = 10
        while position < 12:
            await tail.turn(position, 60)
            found = numbers_after(tail, position)
            assert found
            took.append((number, found))
            position = found[-1]
            if len(took) == 1:
                tail.feed(events(12, 12), 12)

    followers = [asyncio.create_task(follow(number)) for number in range(100)]
    await asyncio.sleep(0)
    tail.feed(events(11, 11), 11)
    await asyncio.gather(*followers)
    first = sum(found == [11] for _, found in took)
    assert 1 < first < 50
    assert took == [
        *((number, [11]) for number in range(first)),
        *((number, [11, 12]) for number in range(first, 100)),
        *((number, [12]) for number in range(first)),
    ]


async def test_a_follower_ahead_of_the_tail(tail: Tail) -> None:
    """Who has read further in the table than the tail has come waits until the tail is further."""
    ahead, behind = asyncio.create_task(tail.turn(12, 60)), asyncio.create_task(tail.turn(10, 60))
    await asyncio.sleep(0)
    tail.feed(events(11, 11), 12)
    tail.forget(asyncio.get_running_loop().time() + 1, 0)
    await behind
    await until_handed_out(tail, 11)
    assert not ahead.done()
    tail.feed(events(12, 13), 13)
    await ahead
    assert numbers_after(tail, 12) == [13]


async def test_what_is_to_be_had_is_kept() -> None:
    """What followers are yet to have in their turn stays in memory for longer, so that they need no table."""
    tail = Tail(1, 20_000, unseen().follows)
    tail.followers = 1
    tail.learn(0)
    got: list[list[int]] = []

    async def follow() -> None:
        position = 0
        while position < 3:
            await tail.turn(position, 60)
            found = numbers_after(tail, position)
            assert found
            position = found[-1]
            got.append(found)

    followers = [asyncio.create_task(follow()) for _ in range(200)]
    await asyncio.sleep(0)
    for n in range(1, 4):
        tail.feed(events(n, n, "x" * 10_000), n)
        await asyncio.sleep(0)
        tail.forget(asyncio.get_running_loop().time() + 1, 20_000)
    await asyncio.gather(*followers)
    assert sum(map(len, got)) == 3 * 200
    tail.forget(asyncio.get_running_loop().time() + 1, 1_000)
    assert numbers_after(tail, 2) is None


async def test_what_is_to_be_had_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes long until everybody has had a turn, four times the usual is kept, and then no more."""
    monkeypatch.setattr("collab_service.log.tail._REST", 1e9)
    monkeypatch.setattr("collab_service.log.tail._LONGEST_REST", 0.02)
    tail = Tail(1, 40_000, unseen().follows)
    tail.followers = 1
    tail.learn(0)
    followers = [asyncio.create_task(tail.turn(0, 60)) for _ in range(600)]  # of whom 32 have their turn together
    await asyncio.sleep(0)
    counts = []
    for n in range(1, 18):
        tail.feed(events(n, n, "x" * 10_000), n)
        await until_handed_out(tail, n)
        kept = [position for position in range(n) if numbers_after(tail, position) is not None]
        assert kept == list(range(kept[0], n))
        counts.append(len(kept))
    assert 6 <= max(counts) <= 8
    await asyncio.gather(*followers)  # nobody waits for a turn to get what is gone


async def test_the_end_while_waiting_for_a_turn(tail: Tail) -> None:
    """The end is told at once to those, too, whose turn would be later; and who leaves before it is not kept."""

    followers = [asyncio.create_task(take_long_over_a_turn(tail))]
    followers += [asyncio.create_task(tail.turn(10, 60)) for _ in range(100)]
    await asyncio.sleep(0)
    tail.feed(events(11, 11), 11)
    await followers[0]
    due = len(tail._due)
    assert due > 50
    followers[-1].cancel()
    await asyncio.gather(followers[-1], return_exceptions=True)
    assert len(tail._due) == due - 1
    tail.end(ShuttingDown())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(follower.done() for follower in followers)
    assert not tail._due


async def test_no_turn_for_what_is_gone(tail: Tail) -> None:
    """Who is so far behind that the table has to be read waits for no turn."""
    tail.feed(events(11, 12), 12)
    tail.forget(asyncio.get_running_loop().time() + 1, 0)
    await asyncio.wait_for(tail.turn(11, 60), 10)
    assert tail.after(11) is None


async def test_the_head_is_told_as_it_is_known(tail: Tail) -> None:
    """The page that many get says how far the log is known to reach by now, although another process wrote that."""
    tail.feed(events(11, 12), 12)
    for head in (12, 20, 30):
        tail.learn(head)
        page = tail.after(10)
        assert page is not None
        assert (page.through, page.head, page.count) == (12, head, 2)


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 20),
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10), st.integers(0, 1_000)), max_size=30),
)
async def test_never_a_gap(start: int, steps: list[tuple[int, int, int]]) -> None:
    """Whatever is fed in whatever order: what is handed out continues the position, and reaches as far as it can."""
    tail = Tail(1, 20_000, unseen().follows)
    tail.followers = 1
    tail.learn(start)
    reached = start
    for first, more, size in steps:
        last = first + more
        tail.feed(events(first, last, "x" * size), last)
        if first <= reached + 1:
            reached = max(reached, last)
        assert tail.reached == reached
        assert tail.head >= reached
        await until_handed_out(tail, reached)
        for position in range(reached + 1):
            found = numbers_after(tail, position)
            if found is not None:
                assert found == list(range(position + 1, position + 1 + len(found)))
                assert found or position == reached


async def take_long_over_a_turn(tail: Tail) -> None:
    """Be a follower at 10 who keeps everything else waiting while it has its turn."""
    await tail.turn(10, 60)
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        pass


async def until_handed_out(tail: Tail, number: int) -> None:
    """Wait for the turn that hands out an event."""

    async def handed_out() -> bool:
        found = numbers_after(tail, number - 1)
        return number == tail.reached and (found != [] or number == 0)

    await until(handed_out, f"event {number}")
