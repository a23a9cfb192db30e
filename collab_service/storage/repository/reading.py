"""The statements that read a session's events."""

from collections.abc import Collection, Sequence

from collab_service.model import Event
from collab_service.storage.database import DriverConnection
from collab_service.storage.repository.rows import EVENT_COLUMNS, event_from_row

_HEADS = """
SELECT s.id,
    coalesce((SELECT server_seq FROM collab_events WHERE session_id = s.id ORDER BY server_seq DESC LIMIT 1), 0)
FROM collab_sessions s WHERE s.id = ANY(%s) AND s.deleted_at IS NULL
"""

# A page is bounded by a count and by bytes, before anything is fetched: the running sum looks at the lengths that
# stand in the rows, without reading large payloads. The first event comes whatever its size. Whether the session still
# exists is part of the same statement and so of the same snapshot: a page never shows a session half removed.
_PAGE = """
SELECT {columns} FROM (
    SELECT *, sum(size) OVER (ORDER BY server_seq) AS total FROM (
        SELECT *, coalesce(octet_length(payload_json), octet_length(payload_binary)) AS size
        FROM collab_events
        WHERE session_id = %(session_id)s AND server_seq > %(after)s AND server_seq <= %(through)s {types}
        ORDER BY server_seq LIMIT %(count)s
    ) AS bounded
) AS summed
WHERE (total <= %(max_bytes)s OR total = size)
  AND EXISTS (SELECT 1 FROM collab_sessions WHERE id = %(session_id)s AND deleted_at IS NULL)
ORDER BY server_seq
"""
_PAGE_OF_ALL = _PAGE.format(columns=", ".join(EVENT_COLUMNS), types="")
_PAGE_OF_TYPES = _PAGE.format(columns=", ".join(EVENT_COLUMNS), types="AND type = ANY(%(types)s)")


async def read_heads(connection: DriverConnection, session_ids: Sequence[int]) -> dict[int, int]:
    """Return each session's last number, 0 when it has no event; sessions that do not exist are left out."""
    cursor = connection.cursor(binary=True)
    await cursor.execute(_HEADS, (list(session_ids),), prepare=True)
    return dict(await cursor.fetchall())


async def read_page(
    connection: DriverConnection,
    session_id: int,
    *,
    after: int,
    through: int,
    types: Collection[str],
    count: int,
    max_bytes: int,
) -> list[Event]:
    """Return the first events above `after`, up to `through`, of the given types (none given: all).

    At most `count` events and `max_bytes` of payloads, but for a single larger event. Empty also when there is no such
    session (any more).
    """
    cursor = connection.cursor(binary=True)
    parameters = {
        "session_id": session_id,
        "after": after,
        "through": through,
        "types": list(types),
        "count": count,
        "max_bytes": max_bytes,
    }
    await cursor.execute(_PAGE_OF_TYPES if types else _PAGE_OF_ALL, parameters, prepare=True)
    return [event_from_row(row) for row in await cursor.fetchall()]
