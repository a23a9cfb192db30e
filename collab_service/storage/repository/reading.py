"""The statements that read a session's events."""

from collections.abc import Collection, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from collab_service.model import Event
from collab_service.storage.database import DriverConnection
from collab_service.storage.repository.rows import EVENT_COLUMNS, event_from_row
from collab_service.storage.repository.wire import message
from collab_service.storage.tables import IS_LIVE

_HEADS = f"""
SELECT s.id,
    coalesce((SELECT server_seq FROM collab_events WHERE session_id = s.id ORDER BY server_seq DESC LIMIT 1), 0)
FROM collab_sessions s WHERE s.id = ANY(%s) AND {IS_LIVE}
"""

_SIZE = "coalesce(octet_length(payload_json), octet_length(payload_binary))"
_PAYLOAD = "coalesce(convert_to(payload_json, 'UTF8'), payload_binary)"

# A page is bounded by a count and by bytes, before anything is fetched: the lengths stand in the rows, so that no large
# payload is read for them. Only where they are too much in all are they summed up one by one. The first event comes
# whatever its size. Whether the session still exists is part of the same statement and so of the same snapshot: a page
# never shows a session half removed.
_BOUNDED = f"""
    FROM collab_events
    WHERE session_id = %(session_id)s AND server_seq > %(after)s AND server_seq <= %(through)s {{types}}
      AND EXISTS (SELECT 1 FROM collab_sessions WHERE id = %(session_id)s AND {IS_LIVE})
    ORDER BY server_seq
"""
_PAGE = f"""
WITH sizes AS MATERIALIZED (SELECT server_seq, {_SIZE} AS size {_BOUNDED} LIMIT %(count)s)
SELECT {{columns}} {_BOUNDED} LIMIT (
    SELECT CASE WHEN coalesce(sum(size), 0) <= %(max_bytes)s THEN count(*) ELSE (
        SELECT greatest(1, count(*) FILTER (WHERE total <= %(max_bytes)s))
        FROM (SELECT sum(size) OVER (ORDER BY server_seq) AS total FROM sizes) AS summed
    ) END
    FROM sizes
)
"""
_TYPES = "AND type = ANY(%(types)s)"
_PAGE_OF_ALL = _PAGE.format(columns=", ".join(EVENT_COLUMNS), types="")
_PAGE_OF_TYPES = _PAGE.format(columns=", ".join(EVENT_COLUMNS), types=_TYPES)
# Rows that an older version wrote, or that somebody has changed by hand, have no envelope.
_ENCODED = f"""
SELECT string_agg(envelope || {_PAYLOAD}, '' ORDER BY server_seq), count(*), max(server_seq), count(envelope)
FROM ({_PAGE.format(columns="server_seq, envelope, payload_json, payload_binary", types="{types}")}) AS page
"""
_ENCODED_PAGE_OF_ALL = _ENCODED.format(types="")
_ENCODED_PAGE_OF_TYPES = _ENCODED.format(types=_TYPES)


class PageBounds(Struct, frozen=True):
    """Which events are asked for: the first ones of a session above `after` and up to `through`."""

    session_id: int
    after: int
    through: int
    types: Collection[str]
    """Of these types; none means all."""
    count: int
    """So many at most."""
    max_bytes: int
    """Bytes of payloads at most, but for a single larger event."""

    def parameters(self) -> dict[str, Any]:
        """Return the statements' parameters."""
        return {**asdict(self), "types": list(self.types)}


class EncodedEvents(Struct, frozen=True):
    """Events as the bytes of a protobuf message with `repeated Event events = 1`."""

    data: bytes
    count: int
    last_server_seq: int


async def read_heads(connection: DriverConnection, session_ids: Sequence[int]) -> dict[int, int]:
    """Return each session's last number, 0 when it has no event; sessions that do not exist are left out."""
    cursor = connection.cursor(binary=True)
    await cursor.execute(_HEADS, (list(session_ids),), prepare=True)
    return dict(await cursor.fetchall())


async def read_page(connection: DriverConnection, bounds: PageBounds) -> list[Event]:
    """Return the events asked for; none also when there is no such session (any more)."""
    cursor = connection.cursor(binary=True)
    statement = _PAGE_OF_TYPES if bounds.types else _PAGE_OF_ALL
    await cursor.execute(statement, bounds.parameters(), prepare=True)
    return [event_from_row(row) for row in await cursor.fetchall()]


async def read_encoded_page(connection: DriverConnection, bounds: PageBounds) -> EncodedEvents | None:
    """Return the events asked for; None when there are none, also when there is no such session (any more)."""
    cursor = connection.cursor(binary=True)
    statement = _ENCODED_PAGE_OF_TYPES if bounds.types else _ENCODED_PAGE_OF_ALL
    await cursor.execute(statement, bounds.parameters(), prepare=True)
    ((data, count, last_server_seq, envelopes),) = await cursor.fetchall()
    if not count:
        return None
    if envelopes == count:
        return EncodedEvents(data, count, last_server_seq)
    events = await read_page(connection, bounds)
    return EncodedEvents(b"".join(map(message, events)), len(events), events[-1].server_seq) if events else None
