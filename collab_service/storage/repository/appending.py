"""The statements of an append transaction.

They go to the driver directly and in pipeline mode, several to a round trip: on a fast disk it is the round trips and
the cost per statement that an append consists of.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from psycopg import AsyncCursor

from collab_service.model import Event, NewEvent
from collab_service.storage.arrays import bytea_array, int8_array, text_array, timestamptz_array
from collab_service.storage.database import DriverConnection
from collab_service.storage.repository.rows import CONTENT_COLUMNS, EVENT_COLUMNS, event_from_row
from collab_service.storage.times import to_micros

_LOCK = "SELECT id FROM collab_sessions WHERE id = ANY(%s) AND deleted_at IS NULL ORDER BY id FOR UPDATE"
_LOCK_FREE = _LOCK + " SKIP LOCKED"

_SET_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %s, true)"

# The last event is the head. A session that exists but was not locked is held by somebody else.
_HEADS = """
SELECT s.id, head.server_seq, head.created_at, head.chain_hash
FROM unnest(%s) AS given (id)
JOIN collab_sessions s ON s.id = given.id AND s.deleted_at IS NULL
LEFT JOIN LATERAL (
    SELECT server_seq, created_at, chain_hash FROM collab_events
    WHERE session_id = s.id ORDER BY server_seq DESC LIMIT 1
) AS head ON true
"""

_KNOWN_KEYS = """
SELECT e.session_id, e.idempotency_key, e.server_seq
FROM unnest(%s, %s) AS given (session_id, idempotency_key)
JOIN collab_events e USING (session_id, idempotency_key)
"""

_STORED = f"""
SELECT {", ".join("e." + name for name in EVENT_COLUMNS.split(", "))}
FROM unnest(%s, %s, %s) AS given (session_id, first, last)
JOIN collab_events e ON e.session_id = given.session_id AND e.server_seq BETWEEN given.first AND given.last
"""

_CONTENT_NAMES = ", ".join(name for name, *_ in CONTENT_COLUMNS)
_INSERT = f"""
INSERT INTO collab_events (session_id, server_seq, created_at, chain_hash, {_CONTENT_NAMES})
SELECT * FROM unnest(%s, %s, %s, %s{", %s" * len(CONTENT_COLUMNS)})
RETURNING session_id, server_seq, id
"""


@dataclass(slots=True)
class Head:
    """The end of a session's log."""

    last_server_seq: int = 0
    created_at: int = 0
    chain_hash: bytes | None = None
    """None when there is no event yet."""


@dataclass(slots=True)
class Locked:
    """What an append transaction knows of the sessions that it asked for."""

    heads: dict[int, Head] = field(default_factory=dict)
    """The sessions whose rows this transaction holds."""
    held: set[int] = field(default_factory=set)
    """Those that exist but are held by somebody else. The rest do not exist."""
    known_keys: dict[tuple[int, str], int] = field(default_factory=dict)
    """The numbers of the events that carry one of the given idempotency keys, by session and key."""


async def lock_sessions(
    connection: DriverConnection,
    session_ids: Iterable[int],
    keys: Sequence[tuple[int, str]],
    *,
    wait_seconds: float | None = None,
) -> Locked:
    """Begin a transaction, lock sessions in the order of their ids, and read their heads and known keys.

    Args:
        connection: A connection without a transaction.
        session_ids: The sessions to lock.
        keys: Idempotency keys to look up, each with its session.
        wait_seconds: How long to wait for rows that others hold; None leaves those rows out.

    Raises:
        psycopg.errors.LockNotAvailable: A row was held for longer than `wait_seconds`.
    """
    ids = int8_array(session_ids)
    lock, heads, known = (connection.cursor(binary=True) for _ in range(3))
    async with connection.pipeline():
        if wait_seconds is None:
            await lock.execute(_LOCK_FREE, (ids,), prepare=True)
        else:
            await connection.execute(_SET_LOCK_TIMEOUT, (f"{int(wait_seconds * 1000)}ms",))
            await lock.execute(_LOCK, (ids,), prepare=True)
        # A statement of its own, so that its snapshot is taken when the locks are ours: in one statement with them it
        # would not see what the previous holder wrote.
        await heads.execute(_HEADS, (ids,), prepare=True)
        if keys:
            parameters = (int8_array(session for session, _ in keys), text_array(key for _, key in keys))
            await known.execute(_KNOWN_KEYS, parameters, prepare=True)
    ours = {session_id for (session_id,) in await lock.fetchall()}
    locked = Locked()
    for session_id, server_seq, created_at, chain_hash in await heads.fetchall():
        if session_id not in ours:
            locked.held.add(session_id)
        elif server_seq is None:
            locked.heads[session_id] = Head()
        else:
            locked.heads[session_id] = Head(server_seq, to_micros(created_at), chain_hash)
    if keys:
        locked.known_keys = {(session_id, key): seq for session_id, key, seq in await known.fetchall()}
    return locked


async def read_stored(
    connection: DriverConnection, ranges: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int], Event]:
    """Return events by session and number, for ranges (session, first, last) of numbers, ends included."""
    cursor = connection.cursor(binary=True)
    columns = zip(*ranges, strict=True)
    await cursor.execute(_STORED, tuple(int8_array(column) for column in columns), prepare=True)
    events = (event_from_row(row) for row in await cursor.fetchall())
    return {(event.session_id, event.server_seq): event for event in events}


@dataclass(frozen=True, slots=True)
class NewRow:
    """An event with the numbers that it is to be stored with."""

    session_id: int
    server_seq: int
    created_at: int
    chain_hash: bytes
    content: NewEvent


class Insert:
    """An insert on its way; its ids are there once the pipeline has been read."""

    def __init__(self, cursor: AsyncCursor[tuple[int, int, int]]) -> None:
        self._cursor = cursor

    async def ids(self) -> dict[tuple[int, int], int]:
        """Return the ids of the new events, by session and number."""
        return {(session_id, seq): event_id for session_id, seq, event_id in await self._cursor.fetchall()}


async def insert_events(connection: DriverConnection, rows: Sequence[NewRow]) -> Insert:
    """Insert events. Call it within `connection.pipeline()`, so that the commit travels with it."""
    contents = [row.content for row in rows]
    parameters = (
        int8_array(row.session_id for row in rows),
        int8_array(row.server_seq for row in rows),
        timestamptz_array(row.created_at for row in rows),
        bytea_array(row.chain_hash for row in rows),
        *(pack(map(value, contents)) for _, pack, value in CONTENT_COLUMNS),
    )
    cursor = connection.cursor(binary=True)
    await cursor.execute(_INSERT, parameters, prepare=True)
    return Insert(cursor)


async def read_ids(connection: DriverConnection, session_id: int, first: int, last: int) -> dict[tuple[int, int], int]:
    """Return the ids of stored events, by session and number."""
    cursor = await connection.execute(
        "SELECT server_seq, id FROM collab_events WHERE session_id = %s AND server_seq BETWEEN %s AND %s",
        (session_id, first, last),
    )
    return {(session_id, seq): event_id for seq, event_id in await cursor.fetchall()}
