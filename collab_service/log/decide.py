"""What becomes of an append: decided here, without any I/O, one request after the other.

A session's row is locked while this runs, so what is known of it cannot change. The requests of one transaction follow
each other: the second one's numbers come after the first one's. No two of them carry the same idempotency key.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct, field

from collab_service.model import Event, NewEvent
from collab_service.model.chain import chain_next, chain_start
from collab_service.model.errors import CollabError, IdempotencyKeyReused, ServerSeqConflict
from collab_service.storage.repository.appending import Head


class AppendRequest(Struct, frozen=True):
    """Events to append to one session, all or nothing, as neighbours."""

    session_id: int
    events: Sequence[NewEvent]
    size: int
    """Its weight in the queue, in bytes."""
    expected_last_server_seq: int | None = None

    def idempotency_keys(self) -> Iterator[tuple[int, str]]:
        """Yield the index and the idempotency key of each event that has one."""
        for index, event in enumerate(self.events):
            if event.idempotency_key is not None:
                yield index, event.idempotency_key


class Appended(Struct, frozen=True):
    """What an append answers, once the transaction is committed."""

    events: list[Event]
    replayed: bool


Decision = Appended | CollabError


class Attempt(Struct, eq=False):
    """A transaction that would have stored a request, and lost its connection during the commit."""

    events: list[Event]
    """What it would have stored of the request."""
    behind: bytes | None
    """The chain hash of the head that it would have stored them behind."""
    may_come_late: bool
    """Whether it may take place even after it was found that it has not: the statement that takes the locks was sent
    with the commit, and may still be on its way. Once something else is stored behind that head, it no longer can."""
    was_looked_for: bool = False
    """Whether it was found, with the session locked, that it has not taken place."""


class SessionState(Struct):
    """A locked session: its end as it was found, what was read of it, and what this transaction adds."""

    session_id: int
    head: Head
    known_keys: dict[str, int] = field(default_factory=dict)
    """The numbers of stored events by idempotency key, for all keys that this transaction's requests carry."""
    stored: dict[int, Event] = field(default_factory=dict)
    """The stored events that those requests might be replays of, or that may come of attempts to store them, by
    number."""
    added: list[Event] = field(default_factory=list)
    """What this transaction adds, in order."""

    def decide(self, request: AppendRequest, digests: Sequence[bytes], now: int, ids: Iterator[int]) -> Decision:
        """Decide on a request, and take its events into account for those that come after it.

        Args:
            request: What is asked.
            digests: The content digest of each of its events.
            now: The clock, in microseconds.
            ids: Yields an unused id for each new event.
        """
        if self.known_keys:
            known = self.known_places(request)
            if known:
                return self._replay(request, known)
        expected = request.expected_last_server_seq
        if expected is not None and expected != self.head.last_server_seq:
            return ServerSeqConflict(expected, self.head.last_server_seq)
        return self._accept(request, digests, now, ids)

    def result_of(self, attempts: Sequence[Attempt]) -> Appended | None:
        """Return what one of the attempts to store a request has stored, if one has."""
        for attempt in attempts:
            first = attempt.events[0]
            there = self.stored.get(first.server_seq)
            if there is not None and there.chain_hash == first.chain_hash:
                return Appended([self.stored[event.server_seq] for event in attempt.events], replayed=False)
        return None

    def known_places(self, request: AppendRequest) -> list[tuple[int, int]]:
        """Return the (index, number) of each event of a request whose key is stored."""
        known = self.known_keys
        return [(index, known[key]) for index, key in request.idempotency_keys() if key in known]

    def _replay(self, request: AppendRequest, known: list[tuple[int, int]]) -> Decision:
        first = replay_start(known)
        numbers = range(first, first + len(request.events))
        events = [event for number in numbers if (event := self.stored.get(number)) is not None]
        if [event.content for event in events] == list(request.events):
            return Appended(events, replayed=True)
        return IdempotencyKeyReused(index for index, _ in known)

    def _accept(self, request: AppendRequest, digests: Sequence[bytes], now: int, ids: Iterator[int]) -> Appended:
        session_id, head = self.session_id, self.head
        seq = head.last_server_seq
        chain_hash = head.chain_hash or chain_start(session_id)
        time = max(now, head.created_at)
        events = []
        for content, digest in zip(request.events, digests, strict=True):
            seq += 1
            chain_hash = chain_next(chain_hash, session_id, seq, time, digest)
            events.append(Event(next(ids), session_id, seq, time, chain_hash, content))
        self.head = Head(seq, time, chain_hash)
        self.added += events
        return Appended(events, replayed=False)


def replay_start(known: Sequence[tuple[int, int]]) -> int:
    """Return the number that a batch's first event has, if the batch is a replay, from its (index, number) pairs."""
    index, number = known[0]
    return number - index
