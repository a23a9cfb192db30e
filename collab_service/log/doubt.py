"""Commits whose outcome nobody knows: finding out, and never guessing."""

import asyncio
import time
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

import structlog
from msgspec.structs import force_setattr

from collab_service.log.connections import AppendConnections
from collab_service.log.decide import Decision
from collab_service.log.queue import Pending
from collab_service.model import Event
from collab_service.model.errors import CommitOutcomeUnknown
from collab_service.storage.pipeline import PipelineConnection
from collab_service.storage.repository import appending

_log = structlog.get_logger(__name__)

_RESOLVE = 30.0
"""Seconds to try to find out what became of a commit."""

Decisions = Sequence[tuple[Pending, Decision]]


class InDoubt(Exception):
    """The connection was lost between sending a commit and reading its answer."""

    def __init__(self, events: Sequence[Event], decisions: Decisions, *, may_come_late: bool) -> None:
        self.events = events
        self.decisions = decisions
        self.may_come_late = may_come_late
        """Whether it may take place even after it was found that it has not: the statement that takes the locks was
        sent with it, and may still be on its way. Once somebody else has written, it no longer can."""


async def took_place(doubt: InDoubt, connections: AppendConnections) -> bool:
    """Find out whether a commit in doubt took place. Whatever goes wrong meanwhile, the answer is never a guess.

    Raises:
        CommitOutcomeUnknown: It could not be found out: the database stays away, or the sessions were deleted.
    """
    _log.warning("the connection was lost during a commit", events=len(doubt.events))
    deadline = time.monotonic() + _RESOLVE
    pause = 0.02
    while any(not pending.answer.done() for pending, _ in doubt.decisions) and time.monotonic() < deadline:
        try:
            async with connections.lend() as connection:
                if (answer := await _is_stored(connection, doubt.events)) is not None:
                    return answer
        except CommitOutcomeUnknown:
            raise
        except Exception as error:
            _log.info("the outcome of a commit is still unknown", cause=repr(error.__cause__ or error))
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)
    raise CommitOutcomeUnknown


async def _is_stored(connection: PipelineConnection, events: Sequence[Event]) -> bool | None:
    """Tell whether a transaction took place that would have added these events, and give them their ids if it did.

    None when others hold their sessions just now. The lock of one is enough: once it is ours, the transaction in doubt
    has ended, and no other has taken its numbers since.
    """
    of_sessions = {session_id: list(some) for session_id, some in groupby(events, attrgetter("session_id"))}
    locked = await appending.lock_sessions(connection, of_sessions, [])
    first = next((some[0] for session_id, some in of_sessions.items() if session_id in locked.heads), None)
    if first is None:
        await connection.run(appending.ROLLBACK)
        if locked.held:
            return None
        raise CommitOutcomeUnknown
    stored = await appending.read_stored(
        connection, [(session_id, some[0].server_seq, some[-1].server_seq) for session_id, some in of_sessions.items()]
    )
    await connection.run(appending.COMMIT)
    refuse_warnings(connection)
    there = stored.get((first.session_id, first.server_seq))
    if there is None or there.chain_hash != first.chain_hash:
        return False
    if len(stored) < len(events):
        raise CommitOutcomeUnknown  # a session has been deleted since
    give_ids(events, [stored[event.session_id, event.server_seq].id for event in events])
    return True


def give_ids(events: Sequence[Event], ids: Sequence[int]) -> None:
    """Set the ids of events that have just been stored, and that nobody else has seen yet."""
    for event, id_ in zip(events, ids, strict=True):
        force_setattr(event, "id", id_)


def refuse_warnings(connection: PipelineConnection) -> None:
    """Raise `CommitOutcomeUnknown` when the last commit came with a warning.

    The server committed here, but no longer waited for a synchronous standby.
    """
    if connection.warnings:
        _log.error("a commit came with a warning", warning=connection.warnings[0])
        raise CommitOutcomeUnknown
