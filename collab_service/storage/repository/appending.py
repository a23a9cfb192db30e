"""The statements of an append transaction, sent in groups; see `collab_service.storage.pipeline` for why."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from msgspec import Struct, field
from psycopg.pq.abc import PGresult

from collab_service.model import Event
from collab_service.storage.binary import (
    BYTEA_ARRAY,
    INT8,
    INT8_ARRAY,
    TEXT,
    TEXT_ARRAY,
    TIMESTAMPTZ_ARRAY,
    bytea_array,
    int8,
    int8_array,
    read_int8,
    read_int8_array,
    read_timestamptz,
    text_array,
    timestamptz_array,
)
from collab_service.storage.pipeline import Command, PipelineConnection, Statement
from collab_service.storage.repository.rows import CONTENT_COLUMNS, EVENT_COLUMNS, event_from_row

BEGIN = Command(Statement(b"begin", b"BEGIN"))
COMMIT = Command(Statement(b"commit", b"COMMIT"))
ROLLBACK = Command(Statement(b"rollback", b"ROLLBACK"))

_SET_LOCK_TIMEOUT = Statement(b"set_lock_timeout", b"SELECT set_config('lock_timeout', $1, true)", (TEXT,))

_LOCK_SQL = b"SELECT id FROM collab_sessions WHERE id = ANY($1) AND deleted_at IS NULL ORDER BY id FOR UPDATE"
_LOCK_WAITING = Statement(b"lock_waiting", _LOCK_SQL, (INT8_ARRAY,))
_LOCK_FREE = Statement(b"lock_free", _LOCK_SQL + b" SKIP LOCKED", (INT8_ARRAY,))

# The last event is the head. A session that exists but was not locked is held by somebody else.
_HEADS = Statement(
    b"heads",
    b"""
    SELECT s.id, head.server_seq, head.created_at, head.chain_hash
    FROM unnest($1) AS given (id)
    JOIN collab_sessions s ON s.id = given.id AND s.deleted_at IS NULL
    LEFT JOIN LATERAL (
        SELECT server_seq, created_at, chain_hash FROM collab_events
        WHERE session_id = s.id ORDER BY server_seq DESC LIMIT 1
    ) AS head ON true
    """,
    (INT8_ARRAY,),
)

_KNOWN_KEYS = Statement(
    b"known_keys",
    b"""
    SELECT e.session_id, e.idempotency_key, e.server_seq
    FROM unnest($1, $2) AS given (session_id, idempotency_key)
    JOIN collab_events e USING (session_id, idempotency_key)
    """,
    (INT8_ARRAY, TEXT_ARRAY),
)

# Taken while the locks are held, so that within a session the ids rise with the numbers.
_NEW_IDS = Statement(
    b"new_ids",
    b"SELECT array_agg(nextval('collab_events_id_seq')) FROM generate_series(1, $1)",
    (INT8,),
)

_STORED = Statement(
    b"stored",
    f"""
    SELECT {", ".join("e." + name for name in EVENT_COLUMNS)}
    FROM unnest($1, $2, $3) AS given (session_id, first, last)
    JOIN collab_events e ON e.session_id = given.session_id AND e.server_seq BETWEEN given.first AND given.last
    """.encode(),
    (INT8_ARRAY, INT8_ARRAY, INT8_ARRAY),
)

_INSERT = Statement(
    b"insert",
    f"""
    INSERT INTO collab_events
        (session_id, server_seq, id, created_at, chain_hash, {", ".join(column.name for column in CONTENT_COLUMNS)})
    SELECT * FROM unnest({", ".join(f"${n}" for n in range(1, 6 + len(CONTENT_COLUMNS)))})
    """.encode(),
    (
        INT8_ARRAY,
        INT8_ARRAY,
        INT8_ARRAY,
        TIMESTAMPTZ_ARRAY,
        BYTEA_ARRAY,
        *(column.array_type for column in CONTENT_COLUMNS),
    ),
)

_READERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(EVENT_COLUMNS, bytes.decode),
    **dict.fromkeys(("id", "session_id", "server_seq", "client_seq"), read_int8),
    **dict.fromkeys(("chain_hash", "payload_binary", "signature"), bytes),
    "created_at": read_timestamptz,
}


class Head(Struct):
    """The end of a session's log."""

    last_server_seq: int = 0
    created_at: int = 0
    chain_hash: bytes | None = None
    """None when there is no event yet."""


class Locked(Struct):
    """What an append transaction knows of the sessions that it asked for."""

    ids: Sequence[int]
    """Reserved for new events; those that are not used leave a gap."""
    heads: dict[int, Head] = field(default_factory=dict)
    """The sessions whose rows this transaction holds."""
    held: set[int] = field(default_factory=set)
    """Those that exist but are held by somebody else. The rest do not exist."""
    known_keys: dict[tuple[int, str], int] = field(default_factory=dict)
    """The numbers of the events that carry one of the given idempotency keys, by session and key."""


async def lock_sessions(
    connection: PipelineConnection,
    session_ids: Collection[int],
    keys: Sequence[tuple[int, str]],
    *,
    new_ids: int,
    wait_seconds: float | None = None,
) -> Locked:
    """Begin a transaction, lock sessions in the order of their ids, and read their heads and known keys.

    Args:
        connection: A connection without a transaction.
        session_ids: The sessions to lock.
        keys: Idempotency keys to look up, each with its session.
        new_ids: How many ids to reserve for new events; at least 1.
        wait_seconds: How long to wait for rows that others hold; None leaves those rows out.

    Raises:
        psycopg.errors.LockNotAvailable: A row was held for longer than `wait_seconds`.
    """
    ids = int8_array(list(session_ids))
    # The heads are read in a statement of their own, whose snapshot is taken when the locks are ours: in one statement
    # with them it would not see what the previous holder wrote.
    commands = [
        Command(_LOCK_FREE if wait_seconds is None else _LOCK_WAITING, [ids]),
        Command(_HEADS, [ids]),
        Command(_NEW_IDS, [int8(new_ids)]),
    ]
    if keys:
        commands.append(Command(_KNOWN_KEYS, [int8_array([s for s, _ in keys]), text_array([key for _, key in keys])]))
    if wait_seconds is None:
        _, *results = await connection.run(BEGIN, *commands)
    else:
        timeout = Command(_SET_LOCK_TIMEOUT, [b"%dms" % int(wait_seconds * 1000)])
        _, _, *results = await connection.run(BEGIN, timeout, *commands)
    lock, heads, reserved, *known = results

    ours = {read_int8(_value(lock, row, 0)) for row in range(lock.ntuples)}
    locked = Locked(read_int8_array(_value(reserved, 0, 0)))
    for row in range(heads.ntuples):
        session_id = read_int8(_value(heads, row, 0))
        if session_id not in ours:
            locked.held.add(session_id)
        elif heads.get_value(row, 1) is None:
            locked.heads[session_id] = Head()
        else:
            locked.heads[session_id] = Head(
                read_int8(_value(heads, row, 1)), read_timestamptz(_value(heads, row, 2)), _value(heads, row, 3)
            )
    for result in known:
        for row in range(result.ntuples):
            place = read_int8(_value(result, row, 0)), _value(result, row, 1).decode()
            locked.known_keys[place] = read_int8(_value(result, row, 2))
    return locked


async def read_stored(
    connection: PipelineConnection, ranges: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int], Event]:
    """Return events by session and number, for ranges (session, first, last) of numbers, ends included."""
    columns = zip(*ranges, strict=True)
    (result,) = await connection.run(Command(_STORED, [int8_array(column) for column in columns]))
    stored = {}
    for row in range(result.ntuples):
        values = ((read, result.get_value(row, column)) for column, read in enumerate(_READERS.values()))
        event = event_from_row([None if value is None else read(value) for read, value in values])
        stored[event.session_id, event.server_seq] = event
    return stored


async def insert_and_commit(connection: PipelineConnection, events: Sequence[Event]) -> None:
    """Insert events, if there are any, and commit, in one round trip.

    Raises:
        psycopg.Error: It failed. If the connection is still usable, nothing was committed; otherwise nobody knows.
    """
    if not events:
        await connection.run(COMMIT)
        return
    contents = [event.content for event in events]
    parameters = [
        int8_array([event.session_id for event in events]),
        int8_array([event.server_seq for event in events]),
        int8_array([event.id for event in events]),
        timestamptz_array([event.created_at for event in events]),
        bytea_array([event.chain_hash for event in events]),
        *(column.pack(list(map(column.value, contents))) for column in CONTENT_COLUMNS),
    ]
    await connection.run(Command(_INSERT, parameters), COMMIT)


def _value(result: PGresult, row: int, column: int) -> bytes:
    value = result.get_value(row, column)
    assert value is not None
    return value
