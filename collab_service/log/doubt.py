"""Commits whose outcome nobody knows: what is remembered of them, to find out and never to guess."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psycopg
import structlog

from collab_service.log.decide import Appended, Attempt, Decision, SessionState
from collab_service.log.plan import Decisions
from collab_service.log.queue import Pending
from collab_service.model.errors import CommitOutcomeUnknown
from collab_service.storage.pipeline import PipelineConnection
from collab_service.storage.repository.appending import Head

_log = structlog.get_logger(__name__)


class InDoubt(Exception):
    """The connection was lost between sending a commit and reading its answer; each request knows of the attempt."""


@contextmanager
def in_doubt_when_lost(
    connection: PipelineConnection, heads: Mapping[int, Head], decisions: Decisions, *, may_come_late: bool
) -> Iterator[None]:
    """Raise `InDoubt` when the connection is lost during a commit that stores events.

    Whatever warning the server has left with, as one that crashes does: the transaction that finds out waits for the
    same standby as the one in doubt did.

    Args:
        connection: What the commit is sent on.
        heads: Of the requests' sessions, behind which it stores them.
        decisions: What it stores.
        may_come_late: Whether the locks are taken by what is sent with it.
    """
    try:
        yield
    except psycopg.Error as error:
        if connection.usable:
            raise  # the server said that it failed
        new = [
            (pending, Attempt(decision.events, head.chain_hash, may_come_late))
            for pending, decision in decisions
            if isinstance(decision, Appended)
            and (head := heads[pending.request.session_id]).last_server_seq < decision.events[0].server_seq
        ]
        if not new:
            raise  # there was nothing to store
        for pending, attempt in new:
            pending.attempts += (attempt,)
        _log.warning("the connection was lost during a commit", requests=len(new))
        raise InDoubt from error


def look_for_attempts(batch: Sequence[Pending], states: Mapping[int, SessionState]) -> bool | None:
    """Forget attempts that have not taken place and never will; tell whether one has, or None where there are none.

    Args:
        batch: Requests.
        states: The sessions that are locked, with what is stored where the attempts would have stored something. With
            the lock ours, whoever held it before has ended; and no other has taken its numbers since.
    """
    found = None
    for pending in batch:
        state = states.get(pending.request.session_id)
        if not pending.attempts or state is None:
            continue
        if state.result_of(pending.attempts) is not None:
            found = True
            continue
        found = found or False
        pending.attempts = tuple(attempt for attempt in pending.attempts if attempt.may_come_late)
        for attempt in pending.attempts:
            attempt.was_looked_for = True
    return found


def doubt_refusals(decisions: Decisions, states: Mapping[int, SessionState]) -> list[tuple[Pending, Decision]]:
    """Return decisions with an unknown outcome in the place of refusals of what may yet come, or may have come.

    It may yet come as long as nothing else is stored behind the head that it would be stored behind.
    """
    return [
        (pending, CommitOutcomeUnknown())
        if not isinstance(decision, Appended) and _may_be_stored(pending, states.get(pending.request.session_id))
        else (pending, decision)
        for pending, decision in decisions
    ]


def _may_be_stored(pending: Pending, state: SessionState | None) -> bool:
    if state is None:
        return bool(pending.attempts)  # and its session was deleted since
    return any(attempt.behind == state.head.chain_hash for attempt in pending.attempts)


def refuse_warnings(connection: PipelineConnection) -> None:
    """Raise `CommitOutcomeUnknown` when the last commit came with a warning.

    The server committed here, but no longer waited for a synchronous standby.
    """
    if connection.warnings:
        _log.error("a commit came with a warning", warning=connection.warnings[0])
        raise CommitOutcomeUnknown
