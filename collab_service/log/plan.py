"""What a transaction is to write: decided on, and packed for the database, before it is known whether it can be."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter

from msgspec import Struct

from collab_service.log.decide import Appended, Decision, SessionState
from collab_service.log.queue import Pending
from collab_service.model import Event
from collab_service.model.errors import SessionNotFound
from collab_service.storage.pipeline import Command
from collab_service.storage.repository import appending
from collab_service.storage.repository.appending import Head

_NO_ID = 0
"""Of an event that gets its id with the insert."""

_LARGE = 64
"""Events."""

Decisions = Sequence[tuple[Pending, Decision]]


class Plan(Struct, frozen=True, eq=False):
    """A transaction that writes requests behind heads, if those are still the heads when it gets there."""

    batch: list[Pending]
    heads: dict[int, Head]
    """What it builds on, by session."""
    left: dict[int, Head]
    """What it leaves."""
    decisions: Decisions
    events: list[Event]
    """What it adds, ordered by session and number, without ids."""
    insert: Command

    @property
    def is_large(self) -> bool:
        """Whether it takes long enough for it to be worth while to plan the next one meanwhile."""
        return len(self.events) >= _LARGE

    def is_for(self, batch: Sequence[Pending], heads: Mapping[int, Head]) -> bool:
        """Tell whether it is what would be planned for these requests and heads."""
        return self.batch == batch and self.heads == heads


class Written(Struct, frozen=True, eq=False):
    """A transaction that is committed, with what is still to be told."""

    decisions: Decisions
    events: Sequence[Event]
    """What is stored since, ordered by session and number."""
    ids: Sequence[int] | None
    """The ids of these events, where they do not have them yet."""
    heads: Sequence[tuple[int, Head, Head]]
    """Of sessions: the head that was found, and the one that was left."""
    active: Collection[int]
    """The sessions whose activity was written with them."""
    begun: float
    """When the first attempt began, by `time.perf_counter`."""
    sent: float | None
    """When the commit was sent; None when there was nothing to commit."""


def plan(batch: Sequence[Pending], heads: dict[int, Head], now: int) -> Plan | None:
    """Plan what writes a batch behind heads; None where one of the requests is refused.

    Args:
        batch: The requests; no two events of a session have the same idempotency key, and none of the keys is stored,
            as far as is known.
        heads: The head of each of their sessions.
        now: The clock, in microseconds.
    """
    states = {session_id: SessionState(session_id, head) for session_id, head in heads.items()}
    decisions = decide_all(batch, states, now, repeat(_NO_ID))
    if not all(isinstance(decision, Appended) for _, decision in decisions):
        return None
    events = added(states.values())
    left = {session_id: state.head for session_id, state in states.items()}
    return Plan(list(batch), heads, left, decisions, events, appending.behind_heads(heads, events))


def decide_all(
    batch: Sequence[Pending], states: Mapping[int, SessionState], now: int, ids: Iterator[int]
) -> list[tuple[Pending, Decision]]:
    """Decide on requests, one after the other. What an attempt has stored of one already is its answer.

    Args:
        batch: The requests.
        states: Their sessions, but for those that do not exist.
        now: The clock, in microseconds.
        ids: Yields an unused id for each new event.
    """
    decisions: list[tuple[Pending, Decision]] = []
    for pending in batch:
        request = pending.request
        state = states.get(request.session_id)
        if state is None:
            decisions.append((pending, SessionNotFound(session_id=request.session_id)))
        else:
            done = state.result_of(pending.attempts) if pending.attempts else None
            decisions.append((pending, done or state.decide(request, pending.digests, now, ids)))
    return decisions


def added(states: Collection[SessionState]) -> list[Event]:
    """Return what is added to sessions, in order."""
    return [event for state in states for event in state.added]


def stored_of(decisions: Decisions) -> list[Event]:
    """Return the events that requests have stored, now or in an earlier attempt, ordered by session and number."""
    stored = [
        event
        for _, decision in decisions
        if isinstance(decision, Appended) and not decision.replayed
        for event in decision.events
    ]
    return sorted(stored, key=attrgetter("session_id", "server_seq"))


def times_of(events: Sequence[Event]) -> dict[int, int]:
    """Return the time of the newest event of each session, in microseconds."""
    return {event.session_id: event.created_at for event in events}


def events_of(batch: Sequence[Pending]) -> int:
    """Return how many events requests have."""
    return sum(len(pending.request.events) for pending in batch)


def keys_of(batch: Sequence[Pending]) -> list[tuple[int, str]]:
    """Return the idempotency keys of requests, each with its session."""
    return [(pending.request.session_id, key) for pending in batch for _, key in pending.request.idempotency_keys()]
