"""What becomes of an append: decided here, without any I/O, one request after the other.

A session's row is locked while this runs, so what is known of it cannot change. Requests of one transaction see each
other: the second one's numbers follow the first one's, and a key that the first one stored is known to the second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from collab_service.model import Event, NewEvent
from collab_service.model.chain import chain_next, chain_start, content_digest
from collab_service.model.errors import CollabError, IdempotencyKeyReused, ServerSeqConflict
from collab_service.storage.repository.appending import Head, NewRow


@dataclass(frozen=True, slots=True)
class AppendRequest:
    """Events to append to one session, all or nothing, as neighbours."""

    session_id: int
    events: Sequence[NewEvent]
    payload_bytes: int
    expected_last_server_seq: int | None = None

    def idempotency_keys(self) -> Iterator[tuple[int, str]]:
        """Yield the index and the idempotency key of each event that has one."""
        for index, event in enumerate(self.events):
            if event.idempotency_key is not None:
                yield index, event.idempotency_key


@dataclass(slots=True)
class Accepted:
    """Rows that will be stored when the transaction commits."""

    rows: list[NewRow]


@dataclass(slots=True)
class Replay:
    """Events that are stored already, or will be by an earlier request of the same transaction."""

    rows: list[Event | NewRow]


Decision = Accepted | Replay | CollabError


@dataclass(slots=True)
class SessionState:
    """A locked session: its end as it was found, what was read of it, and what this transaction adds."""

    session_id: int
    head: Head
    known_keys: dict[str, int] = field(default_factory=dict)
    """The numbers of stored events by idempotency key, for all keys that this transaction's requests carry."""
    stored: dict[int, Event] = field(default_factory=dict)
    """The stored events that those requests might be replays of, by number."""
    planned: dict[int, NewRow] = field(default_factory=dict)
    """What this transaction adds, by number."""

    def decide(self, request: AppendRequest, digests: Sequence[bytes], now: int) -> Decision:
        """Decide on a request, and take its rows into account for those that come after it.

        Args:
            request: What is asked.
            digests: The content digest of each of its events.
            now: The clock, in microseconds.
        """
        known = [(index, self.known_keys[key]) for index, key in request.idempotency_keys() if key in self.known_keys]
        if known:
            return self._replay(request, known)
        expected = request.expected_last_server_seq
        if expected is not None and expected != self.head.last_server_seq:
            return ServerSeqConflict(expected, self.head.last_server_seq)
        return self._accept(request, digests, now)

    def _replay(self, request: AppendRequest, known: list[tuple[int, int]]) -> Decision:
        first = replay_start(known)
        numbers = range(first, first + len(request.events))
        rows = [row for number in numbers if (row := self.planned.get(number) or self.stored.get(number))]
        if [row.content for row in rows] == list(request.events):
            return Replay(rows)
        return IdempotencyKeyReused(index for index, _ in known)

    def _accept(self, request: AppendRequest, digests: Sequence[bytes], now: int) -> Accepted:
        head = self.head
        session_id, seq = self.session_id, head.last_server_seq
        previous = head.chain_hash or chain_start(session_id)
        time = max(now, head.created_at)
        rows = []
        for event, digest in zip(request.events, digests, strict=True):
            seq += 1
            previous = chain_next(previous, session_id, seq, time, digest)
            rows.append(NewRow(session_id, seq, time, previous, event))
        self.head = Head(seq, time, previous)
        for row in rows:
            if row.content.idempotency_key is not None:
                self.known_keys[row.content.idempotency_key] = row.server_seq
        # Kept by number only for keys that come again, which is rare; a dict keeps it simple.
        self.planned.update((row.server_seq, row) for row in rows)
        return Accepted(rows)


def replay_start(known: Sequence[tuple[int, int]]) -> int:
    """Return the number that a batch's first event has, if the batch is a replay, from its (index, number) pairs."""
    index, number = known[0]
    return number - index


def digests_of(events: Sequence[NewEvent]) -> list[bytes]:
    """Return the content digest of each event."""
    return list(map(content_digest, events))


def all_rows(decisions: Sequence[Decision]) -> list[NewRow]:
    """Return the rows to insert, in order."""
    return list(chain.from_iterable(d.rows for d in decisions if isinstance(d, Accepted)))
