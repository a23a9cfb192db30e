"""Commits whose outcome nobody knows: finding out, and never guessing."""

import asyncio
import time
from collections.abc import Sequence

import structlog

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

    def __init__(self, events: Sequence[Event], decisions: Decisions) -> None:
        self.events = events
        self.decisions = decisions


async def took_place(doubt: InDoubt, connections: AppendConnections) -> bool:
    """Find out whether a commit in doubt took place. Whatever goes wrong meanwhile, the answer is never a guess.

    Raises:
        CommitOutcomeUnknown: It could not be found out: the database stays away, or the sessions were deleted.
    """
    _log.warning("the connection was lost during a commit", events=len(doubt.events))
    firsts = list({event.session_id: event for event in reversed(doubt.events)}.values())
    deadline = time.monotonic() + _RESOLVE
    pause = 0.02
    while any(not pending.answer.done() for pending, _ in doubt.decisions) and time.monotonic() < deadline:
        try:
            async with connections.lend() as connection:
                if (answer := await _is_stored(connection, firsts)) is not None:
                    return answer
        except CommitOutcomeUnknown:
            raise
        except Exception as error:
            _log.info("the outcome of a commit is still unknown", cause=repr(error.__cause__ or error))
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)
    raise CommitOutcomeUnknown


async def _is_stored(connection: PipelineConnection, firsts: Sequence[Event]) -> bool | None:
    """Tell whether a transaction took place, by the first event that it would have added to each of its sessions.

    None when others hold those sessions just now. The lock of one is enough: once it is ours, the transaction in doubt
    has ended, and no other has taken its numbers since.
    """
    locked = await appending.lock_sessions(connection, [event.session_id for event in firsts], [], new_ids=1)
    first = next((event for event in firsts if event.session_id in locked.heads), None)
    if first is None:
        await connection.run(appending.ROLLBACK)
        if locked.held:
            return None
        raise CommitOutcomeUnknown
    place = (first.session_id, first.server_seq)
    stored = await appending.read_stored(connection, [(*place, first.server_seq)])
    await connection.run(appending.COMMIT)
    refuse_warnings(connection)
    return place in stored and stored[place].chain_hash == first.chain_hash


def refuse_warnings(connection: PipelineConnection) -> None:
    """Raise `CommitOutcomeUnknown` when the last commit came with a warning.

    The server committed here, but no longer waited for a synchronous standby.
    """
    if connection.warnings:
        _log.error("a commit came with a warning", warning=connection.warnings[0])
        raise CommitOutcomeUnknown
