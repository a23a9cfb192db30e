"""Reads a session's events page by page: the table is the buffer, and a reader is a cursor in it."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from collab_service.model import Event
from collab_service.model.errors import DatabaseUnreachable, ServerSeqBeyondHead, SessionNotFound
from collab_service.storage.database import Database
from collab_service.storage.repository import reading

_PAGE_EVENTS = 500
_PAGE_BYTES = 1024 * 1024
_SCAN = 10_000
"""Numbers that one statement looks through at most, however few of them are of the types asked for."""


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a session's log."""

    events: list[Event]
    through: int
    """Every event up to this number that was asked for has been delivered with this page."""
    head: int
    """The session's last number when reading began."""


async def read_to_head(
    database: Database, session_id: int, *, since: int, limit: int, types: Sequence[str]
) -> AsyncIterator[Page]:
    """Yield the events after `since` up to the head as it is now, at least one page.

    Each page is one short transaction, so a slow reader holds nothing in the database.

    Args:
        database: Where to read.
        session_id: The session.
        since: Read what comes after this number.
        limit: End after so many events; 0 means all.
        types: Only events of these types; none means all.

    Raises:
        SessionNotFound: There is no such session (any more).
        ServerSeqBeyondHead: The session has not reached `since`.
    """
    async with database.driver_connection(autocommit=True) as connection:
        head = await reading.read_head(connection, session_id)
    if head is None:
        raise SessionNotFound(session_id=session_id)
    if since > head:
        raise ServerSeqBeyondHead(since, head)
    if since == head:
        yield Page([], head, head)
    left = limit or head
    while since < head and left:
        page = await _read_page(database, session_id, since, head, types, min(left, _PAGE_EVENTS))
        left -= len(page.events)
        since = page.through
        yield page


async def _read_page(
    database: Database, session_id: int, since: int, head: int, types: Sequence[str], count: int
) -> Page:
    through = min(since + _SCAN, head)
    events = await _read_events(database, session_id, since, through, types, count)
    if events:
        # More may follow below `through`: the page may have been full.
        return Page(events, events[-1].server_seq, head)
    async with database.driver_connection(autocommit=True) as connection:
        if await reading.read_head(connection, session_id) is None:
            raise SessionNotFound(session_id=session_id)
    return Page([], through, head)


async def _read_events(
    database: Database, session_id: int, since: int, through: int, types: Sequence[str], count: int
) -> list[Event]:
    for attempt in (1, 2):  # a pooled connection may have died in its sleep; reading again harms nobody
        try:
            async with database.driver_connection(autocommit=True) as connection:
                return await reading.read_page(
                    connection,
                    session_id,
                    after=since,
                    through=through,
                    types=types,
                    count=count,
                    max_bytes=_PAGE_BYTES,
                )
        except DatabaseUnreachable:
            if attempt == 2:
                raise
    raise AssertionError("unreachable")
