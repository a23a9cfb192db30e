"""Holds a history against the promises: pure functions over what was answered and the logs as they are in the end."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from collab_service.client import BrokenLog, Event, LogCheck
from tests.torture.history import Append, Closed, Delete, Entry, History, Opened, Page

Log = Sequence[Event]


class Violation(Struct, frozen=True):
    """A promise that was not kept."""

    kind: str
    session: int
    text: str
    marks: Sequence[str] = ()
    """The events concerned."""
    reader: str = ""
    """The reader concerned."""

    def matters(self, entry: Entry) -> bool:
        """Tell whether an entry of the history is about this."""
        if isinstance(entry, Append):
            return any(sent.mark in self.marks for sent in entry.events)
        if isinstance(entry, Opened | Page | Closed):
            return entry.reader == self.reader
        return isinstance(entry, Delete) and entry.session == self.session


class _Place(Struct, frozen=True):
    """Where an event stands in a log."""

    number: int
    event: Event


def violations(history: History, logs: Mapping[int, Log | None]) -> list[Violation]:
    """Return every promise that was not kept.

    Args:
        history: What was called and answered, by everybody who called.
        logs: The sessions' events in the end, by id; None where a session is not found.
    """
    appends: dict[int, list[Append]] = defaultdict(list)
    for call in history.appends():
        appends[call.session].append(call)
    deletes = [entry for entry in history.entries if isinstance(entry, Delete)]
    readers = _by_reader(history)
    found: list[Violation] = []
    for session, log in logs.items():
        calls = appends[session]
        own = [delete for delete in deletes if delete.session == session]
        found += _deletion(session, calls, own, log)
        found += _answers(session, calls)
        if log is not None:
            found += _whole(session, log)
            found += _stored(session, calls, log)
            found += _in_order(session, calls, log)
        for entries in readers.values():
            if entries[0].session == session:
                found += _seen(session, calls, entries, log)
    return found


def unlike(session: int, source: str, seen: Log | None, log: Log | None) -> list[Violation]:
    """Return whether a session reads differently elsewhere."""
    if seen == log:
        return []
    if seen is None or log is None:
        return [Violation("views differ", session, f"{source} finds it: {seen is not None}; the table does not agree")]
    at = next((n for n, pair in enumerate(zip(seen, log, strict=False), 1) if pair[0] != pair[1]), None)
    text = f"{source} has {len(seen)} events, the table {len(log)}; the first that differs is {at}"
    return [Violation("views differ", session, text)]


def _whole(session: int, log: Log) -> Iterator[Violation]:
    """Numbers without a gap, times that never go back, ids that rise, and a chain that holds."""
    numbers = [event.server_seq for event in log]
    if numbers != list(range(1, len(log) + 1)):
        at = next(n for n, number in enumerate(numbers, 1) if n != number)
        yield Violation("gap", session, f"where event {at} should be stands {numbers[at - 1]}")
        return
    for before, after in pairwise(log):
        if after.created_at < before.created_at:
            text = f"event {after.server_seq} is of {after.created_at}, the one before of {before.created_at}"
            yield Violation("time", session, text, _marks_of(before, after))
        if after.id <= before.id:
            text = f"event {after.server_seq} has id {after.id}, the one before {before.id}"
            yield Violation("ids", session, text, _marks_of(before, after))
    check = LogCheck(session)
    for event in log:
        try:
            check.add(event)
        except BrokenLog as error:
            if "chain" in str(error):
                yield Violation("chain", session, str(error), _marks_of(event))
            return


def _stored(session: int, calls: Sequence[Append], log: Log) -> Iterator[Violation]:
    """Everything acknowledged is there once as answered; nothing is there that was refused, or that nobody sent."""
    places: dict[str, list[_Place]] = defaultdict(list)
    for event in log:
        places[event.hash or ""].append(_Place(event.server_seq, event))
    by_mark: dict[str, list[Append]] = defaultdict(list)
    for call in calls:
        for sent in call.events:
            by_mark[sent.mark].append(call)

    for mark, stored in places.items():
        numbers = [place.number for place in stored]
        if len(stored) > 1:
            yield Violation("repeated", session, f"{mark} is stored as {numbers}", [mark])
        if mark not in by_mark:
            yield Violation("made up", session, f"nobody sent event {numbers[0]}, {mark!r}", [mark])
        elif all(call.outcome == "refused" for call in by_mark[mark]):
            yield Violation("refused but stored", session, f"{mark} is stored as {numbers[0]}", [mark])

    for call in calls:
        yield from _as_sent(session, call, places)
        if call.outcome == "stored":
            yield from _as_answered(session, call, places)


def _as_sent(session: int, call: Append, places: Mapping[str, Sequence[_Place]]) -> Iterator[Violation]:
    """A batch is there as a whole or not at all, with what was sent, and right behind what it was to stand behind."""
    marks = [sent.mark for sent in call.events]
    stored = [places[mark][0] if mark in places else None for mark in marks]
    there = [place for place in stored if place is not None]
    if not there:
        return
    if len(there) < len(marks):
        yield Violation("split", session, f"call {call.number} is stored in part: {_numbers(stored)}", marks)
    elif any(after.number != before.number + 1 for before, after in pairwise(there)):
        yield Violation("split", session, f"the events of call {call.number} stand at {_numbers(stored)}", marks)
    for sent, place in zip(call.events, stored, strict=True):
        if place is not None:
            content = place.event.content()
            key = content.idempotency_key if call.client and sent.key is None else sent.key
            if (content.payload, content.idempotency_key) != (sent.payload, key):
                yield Violation("made up", session, f"event {place.number} is not what was sent", [sent.mark])
    if call.expected is not None and there[0].number != call.expected + 1:
        text = f"call {call.number} was to stand behind {call.expected} and stands at {there[0].number}"
        yield Violation("condition", session, text, marks)


def _as_answered(session: int, call: Append, places: Mapping[str, Sequence[_Place]]) -> Iterator[Violation]:
    for number, sent in enumerate(call.events, call.first):
        numbers = [place.number for place in places.get(sent.mark, ())]
        if not numbers:
            yield Violation("lost", session, f"{sent.mark} was acknowledged as {number} and is not there", [sent.mark])
        elif number not in numbers:
            text = f"{sent.mark} was acknowledged as {number} and is stored as {numbers}"
            yield Violation("renumbered", session, text, [sent.mark])
        else:
            event = next(place.event for place in places[sent.mark] if place.number == number)
            stored = (event.created_at.isoformat(), event.id, event.chain_hash.hex())
            answered = (call.created_at or stored[0], call.id or stored[1], call.chain_hash or stored[2])
            if stored != answered:
                text = f"of {sent.mark} was answered {answered}, stored is {stored}"
                yield Violation("answered otherwise", session, text, [sent.mark])


def _answers(session: int, calls: Sequence[Append]) -> Iterator[Violation]:
    """What can be told from the answers alone: replays, conditions, and faults of the service's own."""
    answered: dict[str, list[Append]] = defaultdict(list)
    sent: Counter[str] = Counter()
    behind: dict[int, list[Append]] = defaultdict(list)
    for call in calls:
        mark = call.events[0].mark
        sent[mark] += 1
        if call.outcome == "stored":
            answered[mark].append(call)
            if call.expected is not None:
                behind[call.expected].append(call)
            if call.replayed and sent[mark] == 1 and not call.client:
                text = f"call {call.number}, sent for the first time and once, was answered as a replay"
                yield Violation("replay", session, text, [mark])
        elif call.reason in ("INTERNAL", "IDEMPOTENCY_KEY_REUSED"):
            yield Violation("fault of its own", session, f"call {call.number} was answered {call.reason}", [mark])
    for mark, same in answered.items():
        for before, after in pairwise(same):
            if before.first != after.first or before.created_at != after.created_at:
                text = f"calls {before.number} and {after.number} of {mark} were answered differently"
                yield Violation("replay", session, text, [mark])
        if sum(not call.replayed for call in same) > 1:
            yield Violation("replay", session, f"{mark} was answered twice as new", [mark])
    for expected, those in behind.items():
        marks = {call.events[0].mark for call in those}
        if len(marks) > 1:
            text = f"{len(marks)} appends behind {expected} have succeeded"
            yield Violation("both conditions", session, text, sorted(marks))


def _in_order(session: int, calls: Sequence[Append], log: Log) -> Iterator[Violation]:
    """Requests of a stream stand in their order; what began after an acknowledgement stands behind it."""
    places = {event.hash: event.server_seq for event in log}
    attempts: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        attempts[call.events[0].mark].append(call.stream)
    streams: dict[str, list[Append]] = defaultdict(list)
    for call in calls:
        if call.stream:
            streams[call.stream].append(call)
    for stream in streams.values():
        yield from _stream_in_order(session, stream, places, attempts)

    first_begun: dict[str, Append] = {}
    for call in calls:
        first_begun.setdefault(call.events[0].mark, call)
    answered = sorted((c for c in calls if c.outcome == "stored" and c.ended is not None), key=lambda c: c.ended or 0)
    behind: Append | None = None
    position = 0
    for call in first_begun.values():  # in the order in which they began
        while position < len(answered) and (answered[position].ended or 0) < call.begun:
            if behind is None or answered[position].first > behind.first:
                behind = answered[position]
            position += 1
        place = places.get(call.events[0].mark)
        if behind is not None and place is not None and place < behind.first:
            marks = [behind.events[0].mark, call.events[0].mark]
            text = f"{marks[1]} stands at {place}, although {marks[0]} had been acknowledged as {behind.first} before"
            yield Violation("order", session, text, marks)


def _stream_in_order(
    session: int, stream: Sequence[Append], places: Mapping[str | None, int], attempts: Mapping[str, Sequence[str]]
) -> Iterator[Violation]:
    """Compare requests that were sent in the same streams; where only one was sent elsewhere, either may come first."""
    groups: dict[tuple[str, ...], list[Append]] = defaultdict(list)
    for call in stream:
        groups[tuple(attempts[call.events[0].mark])].append(call)
    for same in groups.values():
        last: Append | None = None
        missing: Append | None = None
        for call in same:
            mark = call.events[0].mark
            place = places.get(mark)
            if place is None:
                # One with a condition may have been refused, with an answer that has got lost.
                if call.outcome == "unknown" and call.expected is None and not call.client:
                    missing = missing or call
                continue
            if missing is not None:
                marks = [missing.events[0].mark, mark]
                text = f"{marks[1]} is stored, and {marks[0]}, sent before it in the same stream, is not"
                yield Violation("order", session, text, marks)
            if last is not None and place < places[last.events[0].mark]:
                marks = [last.events[0].mark, mark]
                text = f"{marks[1]} stands before {marks[0]}, which was sent before it in the same stream"
                yield Violation("order", session, text, marks)
            last = call


def _deletion(session: int, calls: Sequence[Append], deletes: Sequence[Delete], log: Log | None) -> Iterator[Violation]:
    """A session that was deleted is gone from the answer on; one that nobody has deleted is there."""
    gone_at = min((d.ended for d in deletes if d.outcome == "stored" and d.ended is not None), default=None)
    if log is None and not any(delete.outcome != "refused" for delete in deletes):
        yield Violation("lost", session, "the session is not found, and nobody has deleted it")
    if log is not None and gone_at is not None:
        yield Violation("not deleted", session, "the session is found after it was deleted")
    for call in calls:
        mark = call.events[0].mark
        if gone_at is not None and call.outcome == "stored" and call.begun > gone_at:
            text = f"call {call.number} has succeeded after the session was deleted"
            yield Violation("not deleted", session, text, [mark])
        if call.reason == "SESSION_NOT_FOUND" and not deletes:
            yield Violation("fault of its own", session, f"call {call.number} did not find the session", [mark])


def _seen(
    session: int, calls: Sequence[Append], entries: Sequence[Opened | Page | Closed], log: Log | None
) -> Iterator[Violation]:
    """A reader has seen the log from where it began, in order, each event once, and heads at the ends of appends."""
    opened = entries[0]
    assert isinstance(opened, Opened)
    reader = opened.reader
    position = opened.since
    logged = None if log is None else [(e.server_seq, e.id, e.chain_hash.hex()) for e in log]
    places = {event.hash: event.server_seq for event in log or ()}
    inside: set[int] = set()
    for call in calls:
        first = call.first or places.get(call.events[0].mark)
        if first is not None:
            inside.update(range(first, first + len(call.events) - 1))
    known: dict[int, str] = {}
    head_at_opening = head = 0
    for entry in entries:
        if isinstance(entry, Opened):
            head_at_opening = max((_last(c) for c in calls if c.outcome == "stored" and _before(c, entry)), default=0)
            if entry.since != position:
                yield Violation("reader", session, f"{reader} went on from {entry.since}, not {position}", (), reader)
                position = entry.since
        elif isinstance(entry, Closed):
            if not entry.reason and position != head:
                yield Violation(
                    "reader", session, f"{reader} was told at {position} of {head} that it is all", (), reader
                )
            if entry.reason == "SERVER_SEQ_BEYOND_HEAD":
                yield Violation("reader", session, f"{reader} is told that the log ends before {position}", (), reader)
        else:
            head = entry.head
            for number, id_, chain_hash in entry.events:
                if number != position + 1:
                    yield Violation("reader", session, f"{reader} saw {number} after {position}", (), reader)
                elif logged is not None and (number > len(logged) or logged[number - 1] != (number, id_, chain_hash)):
                    yield Violation("reader", session, f"what {reader} saw as {number} is not there", (), reader)
                position = number
                known[number] = chain_hash
            if entry.through != position or entry.head < entry.through:
                text = f"{reader} was told through {entry.through} and head {entry.head} at {position}"
                yield Violation("reader", session, text, (), reader)
            if entry.head in inside:
                yield Violation("head", session, f"{reader} was told of a head inside an append", (), reader)
            if entry.head < head_at_opening:
                text = f"{reader} was told of head {entry.head} when {head_at_opening} had been acknowledged"
                yield Violation("stale", session, text, (), reader)
    for call in calls:
        if call.outcome == "stored" and call.chain_hash and known.get(call.first, call.chain_hash) != call.chain_hash:
            text = f"{reader} saw another event at {call.first} than call {call.number} was answered"
            yield Violation("reader", session, text, [call.events[0].mark], reader)
    if opened.follow and log is not None and position != len(log):
        yield Violation("reader", session, f"{reader} has come to {position} of {len(log)}", (), reader)


def _by_reader(history: History) -> dict[str, list[Opened | Page | Closed]]:
    readers: dict[str, list[Opened | Page | Closed]] = defaultdict(list)
    for entry in history.entries:
        if isinstance(entry, Opened | Page | Closed):
            readers[entry.reader].append(entry)
    return readers


def _last(call: Append) -> int:
    return call.first + len(call.events) - 1


def _before(call: Append, opened: Opened) -> bool:
    return call.ended is not None and call.ended < opened.begun


def _numbers(places: Iterable[_Place | None]) -> list[int | None]:
    return [place.number if place is not None else None for place in places]


def _marks_of(*events: Event) -> list[str]:
    return [event.hash or "" for event in events]
