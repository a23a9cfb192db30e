"""The checker itself: a history in which everything is right, and one for each promise that is not kept."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from collab_service.client import Event
from collab_service.model.chain import chain_next, chain_start, content_digest
from tests.torture.checker import unlike, violations
from tests.torture.history import Append, Closed, Delete, History, Opened, Outcome, Page, Sent, page_events

SESSION = 7
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class World:
    """A session, and what everybody has been told of it."""

    def __init__(self) -> None:
        self.history = History()
        self.log: list[Event] | None = []
        self._time = 0.0

    @property
    def events(self) -> list[Event]:
        """The log, which is there."""
        assert self.log is not None
        return self.log

    def call(
        self,
        *marks: str,
        outcome: Outcome = "stored",
        first: int = 0,
        expected: int | None = None,
        stream: str = "",
        replayed: bool = False,
        reason: str = "",
    ) -> Append:
        """Let somebody call, and be answered."""
        sent = [Sent(mark, f'{{"of":"{mark}"}}', f"key/{mark}") for mark in marks]
        call = self.history.append(SESSION, "writer", sent, expected=expected, stream=stream)
        call.begun, call.ended = self._tick(), self._tick()
        call.outcome, call.first, call.replayed, call.reason = outcome, first, replayed, reason
        return call

    def store(self, *marks: str, expected: int | None = None, stream: str = "") -> Append:
        """Let somebody append, store it, and answer."""
        first = len(self.events) + 1
        for mark in marks:
            self.add(mark, at=first)
        call = self.call(*marks, first=first, expected=expected, stream=stream)
        call.created_at = self.events[-1].created_at.isoformat()
        if len(marks) == 1:
            call.id, call.chain_hash = self.events[-1].id, self.events[-1].chain_hash.hex()
        return call

    def add(self, mark: str, *, at: int | None = None) -> None:
        """Put an event into the log, by default a second behind the last."""
        number = len(self.events) + 1
        made = Event(
            id=100 + number, session_id=SESSION, server_seq=number, created_at=_BEGIN + timedelta(seconds=at or number),
            chain_hash=b"", payload=f'{{"of":"{mark}"}}', actor_id=None, client_seq=None, type=None, hash=mark,
            signature=b"", idempotency_key=f"key/{mark}",
        )  # fmt: skip
        self.events.append(made)
        self.chain()

    def chain(self) -> None:
        """Compute the chain anew."""
        last = chain_start(SESSION)
        for place, event in enumerate(self.events):
            micros = (event.created_at - _EPOCH) // timedelta(microseconds=1)
            last = chain_next(last, SESSION, event.server_seq, micros, content_digest(event))
            self.events[place] = replace(event, chain_hash=last)

    def read(self, *pages: tuple[int, int], head: int | None = None, follow: bool = True) -> None:
        """Let somebody read pages, each from one number to another."""
        self.history.entries.append(Opened("reader", SESSION, pages[0][0] - 1, follow, self._tick()))
        for first, last in pages:
            events = page_events(self.events[first - 1 : last])
            at = self._tick()
            self.history.entries.append(Page("reader", SESSION, at, events, last, head or len(self.events)))

    def close(self, reason: str = "") -> None:
        """End what was read."""
        self.history.entries.append(Closed("reader", SESSION, self._tick(), reason))

    def delete(self, outcome: Outcome = "stored") -> None:
        """Delete the session."""
        delete = Delete(len(self.history.entries), SESSION, self._tick(), self._tick(), outcome)
        self.history.entries.append(delete)

    def found(self) -> set[str]:
        """Return what the checker finds."""
        return {violation.kind for violation in violations(self.history, {SESSION: self.log})}

    def _tick(self) -> float:
        self._time += 1
        return self._time


def good() -> World:
    """Everything that may happen: all outcomes, a replay, conditions, a stream, batches, and readers."""
    world = World()
    world.store("a")
    batch = world.store("b", "c", "d")
    world.call("b", "c", "d", first=2, replayed=True).created_at = batch.created_at
    world.call("refused", outcome="refused", expected=1, reason="SERVER_SEQ_CONFLICT")
    world.store("e", expected=4)
    world.call("lost on the way", outcome="unknown")
    world.call("f", outcome="unknown")
    world.add("f")
    world.store("g", stream="s")
    world.call("conflict whose answer got lost", outcome="unknown", expected=3, stream="s")
    world.store("h", stream="s")
    world.read((1, 3), (4, 8))
    return world


def test_what_is_right() -> None:
    """Nothing is found where every promise was kept."""
    assert good().found() == set()
    deleted = good()
    deleted.delete()
    deleted.log = None
    assert deleted.found() == set()


def _lost(world: World) -> None:
    world.call("z", first=9)


def _repeated(world: World) -> None:
    world.add("a")


def _renumbered(world: World) -> None:
    world.add("z")
    world.call("z", first=4)


def _answered_otherwise(world: World) -> None:
    world.store("z").chain_hash = "00"


def _made_up(world: World) -> None:
    world.add("z")


def _other_content(world: World) -> None:
    world.store("z")
    world.events[-1] = replace(world.events[-1], payload="{}")
    world.chain()


def _refused_but_stored(world: World) -> None:
    world.call("z", outcome="refused")
    world.add("z")


def _gap(world: World) -> None:
    del world.events[5]


def _time(world: World) -> None:
    world.events[4] = replace(world.events[4], created_at=_BEGIN)
    world.chain()


def _ids(world: World) -> None:
    world.events[4] = replace(world.events[4], id=1)


def _chain(world: World) -> None:
    world.events[5] = replace(world.events[5], actor_id="eve")


def _split(world: World) -> None:
    world.add("y1")
    world.add("between")
    world.add("y2")
    world.call("between", first=10)
    world.call("y1", "y2", outcome="unknown")


def _in_part(world: World) -> None:
    world.add("y1")
    world.call("y1", "y2", outcome="unknown")


def _condition(world: World) -> None:
    world.store("z", expected=3)


def _both_conditions(world: World) -> None:
    world.store("y", expected=8)
    world.call("z", first=9, expected=8)


def _replay_of_nothing(world: World) -> None:
    world.store("z").replayed = True


def _replay_answered_otherwise(world: World) -> None:
    world.call("a", first=2, replayed=True)


def _twice_as_new(world: World) -> None:
    world.call("a", first=1).created_at = world.events[0].created_at.isoformat()


def _own_fault(world: World) -> None:
    world.call("z", outcome="unknown", reason="INTERNAL")


def _stream_order(world: World) -> None:
    world.add("second")
    world.add("first")
    world.call("first", first=10, stream="t")
    world.call("second", first=9, stream="t")


def _stream_hole(world: World) -> None:
    world.call("first", outcome="unknown", stream="t")
    world.store("second", stream="t")


def _behind_what_was_acknowledged(world: World) -> None:
    world.add("late")
    world.store("early")
    world.call("late", outcome="unknown")


def _deleted_and_there(world: World) -> None:
    world.delete()


def _gone_and_not_deleted(world: World) -> None:
    world.log = None


def _appended_after_deletion(world: World) -> None:
    world.delete()
    world.call("z", first=9)
    world.log = None


def _reader_missed(world: World) -> None:
    world.history.entries.pop()
    world.read((5, 8))


def _reader_saw_twice(world: World) -> None:
    world.read((8, 8))


def _reader_saw_another(world: World) -> None:
    world.history.entries[-1].events[-1] = (8, 1, "00")  # type: ignore[union-attr, index]


def _reader_stopped_short(world: World) -> None:
    world.history.entries.pop()


def _reader_told_the_end_too_early(world: World) -> None:
    world.history.entries[-1].head = 9  # type: ignore[union-attr]
    world.close()


def _reader_sent_away(world: World) -> None:
    world.close("SERVER_SEQ_BEYOND_HEAD")


def _head_within_a_batch(world: World) -> None:
    world.history.entries.append(Page("other", SESSION, 99, [], 0, 3))
    world.history.entries.insert(-1, Opened("other", SESSION, 0, False, 0.5))


def _stale(world: World) -> None:
    world.history.entries.append(Opened("other", SESSION, 0, False, 99))
    world.history.entries.append(Page("other", SESSION, 100, page_events(world.events[:1]), 1, 1))


_BROKEN: list[tuple[Callable[[World], None], str]] = [
    (_lost, "lost"),
    (_repeated, "repeated"),
    (_renumbered, "renumbered"),
    (_answered_otherwise, "answered otherwise"),
    (_made_up, "made up"),
    (_other_content, "made up"),
    (_refused_but_stored, "refused but stored"),
    (_gap, "gap"),
    (_time, "time"),
    (_ids, "ids"),
    (_chain, "chain"),
    (_split, "split"),
    (_in_part, "split"),
    (_condition, "condition"),
    (_both_conditions, "both conditions"),
    (_replay_of_nothing, "replay"),
    (_replay_answered_otherwise, "replay"),
    (_twice_as_new, "replay"),
    (_own_fault, "fault of its own"),
    (_stream_order, "order"),
    (_stream_hole, "order"),
    (_behind_what_was_acknowledged, "order"),
    (_deleted_and_there, "not deleted"),
    (_gone_and_not_deleted, "lost"),
    (_appended_after_deletion, "not deleted"),
    (_reader_missed, "reader"),
    (_reader_saw_twice, "reader"),
    (_reader_saw_another, "reader"),
    (_reader_stopped_short, "reader"),
    (_reader_told_the_end_too_early, "reader"),
    (_reader_sent_away, "reader"),
    (_head_within_a_batch, "head"),
    (_stale, "stale"),
]


@pytest.mark.parametrize(("damage", "kind"), _BROKEN, ids=[damage.__name__[1:] for damage, _ in _BROKEN])
def test_what_is_wrong(damage: Callable[[World], None], kind: str) -> None:
    """Each promise that was not kept is found, by its name."""
    world = good()
    damage(world)
    assert kind in world.found()


def test_two_views_that_differ() -> None:
    """What one connection reads and the table does not have is found, and nothing where both are the same."""
    log = good().events
    assert unlike(SESSION, "connection 1", list(log), log) == []
    for other in (log[:-1], [*log[:-1], replace(log[-1], type="other")], None):
        assert [violation.kind for violation in unlike(SESSION, "connection 1", other, log)] == ["views differ"]
