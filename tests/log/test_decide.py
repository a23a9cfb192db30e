"""Decisions about appends, without I/O."""

from itertools import count

from collab_service.log.decide import Appended, AppendRequest, SessionState
from collab_service.model import NewEvent
from collab_service.model.chain import content_digest
from collab_service.model.errors import IdempotencyKeyReused, ServerSeqConflict
from collab_service.storage.repository.appending import Head

KEYED = NewEvent(actor_id="a", idempotency_key="k")
PLAIN = NewEvent(actor_id="b")


def decide(state: SessionState, *events: NewEvent, now: int = 100, expected: int | None = None) -> object:
    """Decide on a batch."""
    digests = [content_digest(event) for event in events]
    return state.decide(AppendRequest(1, events, 0, expected), digests, now, count(1))


def test_time_never_goes_back() -> None:
    """create_time is the later of the clock and the previous event's time, whatever the clock does."""
    state = SessionState(1, Head(3, 500, b"x" * 32))
    decided = [decide(state, PLAIN, now=now) for now in (400, 600, 550)]
    assert [d.events[0].created_at for d in decided if isinstance(d, Appended)] == [500, 600, 600]


def stored(*events: NewEvent) -> SessionState:
    """Return a session that holds some events."""
    before = SessionState(1, Head())
    decided = decide(before, *events)
    assert isinstance(decided, Appended)
    keys = {e.content.idempotency_key: e.server_seq for e in decided.events if e.content.idempotency_key}
    return SessionState(1, before.head, keys, {event.server_seq: event for event in decided.events})


def test_a_replay_comes_before_the_condition() -> None:
    """The idempotency key is looked at before expected_last_server_seq."""
    state = stored(KEYED)
    assert decide(state, KEYED, expected=0) == Appended(list(state.stored.values()), replayed=True)
    assert isinstance(decide(state, PLAIN, expected=0), ServerSeqConflict)


def test_a_batch_is_a_replay_only_as_a_whole() -> None:
    """A known key in a batch makes the whole batch be compared with the neighbours stored there."""
    state = stored(PLAIN, KEYED, PLAIN)
    for batch in ((PLAIN, KEYED, PLAIN), (KEYED, PLAIN), (PLAIN, KEYED), (KEYED,)):
        answer = decide(state, *batch)
        assert isinstance(answer, Appended)
        assert answer.replayed
        assert tuple(event.content for event in answer.events) == batch
    for batch in (
        (KEYED, PLAIN, PLAIN),
        (PLAIN, PLAIN, KEYED),
        (KEYED, KEYED),
        (NewEvent(idempotency_key="k"),),
    ):
        assert isinstance(decide(state, *batch), IdempotencyKeyReused)
    assert state.head.last_server_seq == 3
    assert not state.added
