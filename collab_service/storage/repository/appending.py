"""The statements of an append transaction, sent in groups; see `collab_service.storage.pipeline` for why."""

from collections.abc import Callable, Collection, Mapping, Sequence
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
from collab_service.storage.repository.wire import envelope, sql_with_id
from collab_service.storage.tables import IS_LIVE

BEGIN = Command(Statement(b"begin", b"BEGIN"))
COMMIT = Command(Statement(b"commit", b"COMMIT"))
ROLLBACK = Command(Statement(b"rollback", b"ROLLBACK"))

# One plan for each statement, whatever the lengths of the arrays: planning takes as long as inserting twenty rows. And
# less time for each than reads have, since everybody's appends wait for it; a commit is not bounded by it, however long
# a synchronous standby takes.
SET_UP_CONNECTION = Command(
    Statement(
        b"set_up_connection",
        b"""
        SELECT set_config('plan_cache_mode', 'force_generic_plan', false),
               set_config('statement_timeout', '15s', false)
        """,
    )
)

_SET_LOCK_TIMEOUT = Statement(b"set_lock_timeout", b"SELECT set_config('lock_timeout', $1, true)", (TEXT,))

_LOCK_SQL = f"SELECT id FROM collab_sessions WHERE id = ANY($1) AND {IS_LIVE} ORDER BY id FOR UPDATE".encode()
_LOCK_WAITING = Statement(b"lock_waiting", _LOCK_SQL, (INT8_ARRAY,))
_LOCK_FREE = Statement(b"lock_free", _LOCK_SQL + b" SKIP LOCKED", (INT8_ARRAY,))

# Lookups by key are written as LATERAL subqueries that cannot be flattened (OFFSET 0), so that each is one descent into
# an index whatever PostgreSQL believes of the tables. The plans are kept, and on a connection that was opened when the
# tables were new, joins had been planned as scans of them, until the first ANALYZE.

# The last event is the head. A session that exists but was not locked is held by somebody else.
_HEADS = Statement(
    b"heads",
    f"""
    SELECT s.id, head.server_seq, head.created_at, head.chain_hash
    FROM unnest($1) AS given (id)
    CROSS JOIN LATERAL (SELECT id FROM collab_sessions WHERE id = given.id AND {IS_LIVE} OFFSET 0) AS s
    LEFT JOIN LATERAL (
        SELECT server_seq, created_at, chain_hash FROM collab_events
        WHERE session_id = s.id ORDER BY server_seq DESC LIMIT 1
    ) AS head ON true
    """.encode(),
    (INT8_ARRAY,),
)

_KNOWN_KEYS = Statement(
    b"known_keys",
    b"""
    SELECT given.session_id, given.idempotency_key, e.server_seq
    FROM unnest($1, $2) AS given (session_id, idempotency_key)
    CROSS JOIN LATERAL (
        SELECT server_seq FROM collab_events
        WHERE session_id = given.session_id AND idempotency_key = given.idempotency_key OFFSET 0
    ) AS e
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
    CROSS JOIN LATERAL (
        SELECT * FROM collab_events
        WHERE session_id = given.session_id AND server_seq BETWEEN given.first AND given.last OFFSET 0
    ) AS e
    """.encode(),
    (INT8_ARRAY, INT8_ARRAY, INT8_ARRAY),
)

_COLUMNS = (
    ("session_id", INT8_ARRAY),
    ("server_seq", INT8_ARRAY),
    ("created_at", TIMESTAMPTZ_ARRAY),
    ("chain_hash", BYTEA_ARRAY),
    *((column.name, column.array_type) for column in CONTENT_COLUMNS),
    ("envelope", BYTEA_ARRAY),
)
_COLUMN_NAMES = ", ".join(name for name, _ in _COLUMNS)
_WITH_ID = _COLUMN_NAMES.replace("envelope", sql_with_id("envelope", "id"))
_COLUMN_TYPES = tuple(oid for _, oid in _COLUMNS)
_COLUMN_PARAMETERS = ", ".join(f"${n}" for n in range(1, 1 + len(_COLUMNS)))
_MORE = tuple(f"${n}" for n in range(1 + len(_COLUMNS), 4 + len(_COLUMNS)))

_INSERT = Statement(
    b"insert",
    f"""
    INSERT INTO collab_events ({_COLUMN_NAMES}, id)
    SELECT * FROM unnest({_COLUMN_PARAMETERS}, {_MORE[0]})
    """.encode(),
    (*_COLUMN_TYPES, INT8_ARRAY),
)

# A whole append transaction in one statement, for sessions whose heads are known. It inserts everything, or nothing
# when a session is gone, held by somebody else, or has another head. Its snapshot is older than its locks, so a head
# may have moved in between; but then the numbers are taken, and the primary key refuses them. The ids are taken from
# the sequence while the locks are held, here as well.
_INSERT_BEHIND_HEADS = Statement(
    b"insert_behind_heads",
    f"""
    WITH locked AS MATERIALIZED (
        SELECT id FROM collab_sessions WHERE id = ANY({_MORE[0]}) AND {IS_LIVE} FOR UPDATE SKIP LOCKED
    ), inserted AS (
        INSERT INTO collab_events ({_COLUMN_NAMES}, id)
        SELECT {_WITH_ID}, id
        FROM (
            SELECT *, nextval('collab_events_id_seq') AS id
            FROM unnest({_COLUMN_PARAMETERS}) AS given ({_COLUMN_NAMES})
            WHERE (SELECT count(*) FROM locked) = cardinality({_MORE[0]})
              AND NOT EXISTS (
                  SELECT FROM unnest({", ".join(_MORE)}) AS known (session_id, server_seq, chain_hash)
                  WHERE known.chain_hash IS DISTINCT FROM (
                      SELECT e.chain_hash FROM collab_events e
                      WHERE e.session_id = known.session_id AND e.server_seq >= known.server_seq
                      ORDER BY e.server_seq DESC LIMIT 1
                  )
              )
        ) AS new
        RETURNING session_id, server_seq, id
    )
    SELECT array_agg(id ORDER BY session_id, server_seq) FROM inserted
    """.encode(),
    (*_COLUMN_TYPES, INT8_ARRAY, INT8_ARRAY, BYTEA_ARRAY),
)

# When sessions were active, written by the transaction that holds their rows. Where it has inserted nothing, this does
# nothing either: it waits for no lock, and moves no time beyond the last event's.
_TOUCH = Statement(
    b"touch",
    f"""
    UPDATE collab_sessions s SET last_active = given.at
    FROM unnest($1, $2) AS given (id, at)
    WHERE s.id = given.id AND s.last_active < given.at
      AND s.id IN (
          SELECT id FROM collab_sessions WHERE id = ANY($1) AND {IS_LIVE} FOR UPDATE SKIP LOCKED
      )
      AND given.at <= (
          SELECT e.created_at FROM collab_events e
          WHERE e.session_id = given.id ORDER BY e.server_seq DESC LIMIT 1
      )
    """.encode(),
    (INT8_ARRAY, TIMESTAMPTZ_ARRAY),
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
    new_ids: int = 0,
    wait_seconds: float | None = None,
) -> Locked:
    """Begin a transaction, lock sessions in the order of their ids, and read their heads and known keys.

    Args:
        connection: A connection without a transaction.
        session_ids: The sessions to lock.
        keys: Idempotency keys to look up, each with its session.
        new_ids: How many ids to reserve for new events.
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
    ]
    if new_ids:
        commands.append(Command(_NEW_IDS, [int8(new_ids)]))
    if keys:
        commands.append(Command(_KNOWN_KEYS, [int8_array([s for s, _ in keys]), text_array([key for _, key in keys])]))
    if wait_seconds is None:
        _, *results = await connection.run(BEGIN, *commands)
    else:
        timeout = Command(_SET_LOCK_TIMEOUT, [b"%dms" % int(wait_seconds * 1000)])
        _, _, *results = await connection.run(BEGIN, timeout, *commands)
    lock, heads, *more = results

    ours = {read_int8(_value(lock, row, 0)) for row in range(lock.ntuples)}
    locked = Locked(read_int8_array(_value(more.pop(0), 0, 0)) if new_ids else ())
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
    for result in more:
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


async def insert_and_commit(
    connection: PipelineConnection, events: Sequence[Event], *, active: Mapping[int, int]
) -> None:
    """Insert events, if there are any, and commit, in one round trip.

    Args:
        connection: A connection whose transaction has locked the events' sessions.
        events: What to insert.
        active: Times to write as those of the sessions' last activity, in microseconds.

    Raises:
        psycopg.Error: It failed. If the connection is still usable, nothing was committed; otherwise nobody knows.
    """
    commands = [*_touch(active), COMMIT]
    if events:
        ids = int8_array([event.id for event in events])
        commands.insert(0, Command(_INSERT, [*_columns(events), ids]))
    await connection.run(*commands)


def behind_heads(heads: Mapping[int, Head], events: Sequence[Event]) -> Command:
    """Return what inserts events if their sessions' heads are those given, for `insert_behind_heads`.

    Args:
        heads: The head of each session.
        events: At least one, ordered by session and number; their ids are not looked at.
    """
    known = [
        int8_array(list(heads)),
        int8_array([head.last_server_seq for head in heads.values()]),
        bytea_array([head.chain_hash for head in heads.values()]),
    ]
    return Command(_INSERT_BEHIND_HEADS, [*_columns(events), *known])


async def insert_behind_heads(
    connection: PipelineConnection, insert: Command, *, active: Mapping[int, int]
) -> list[int] | None:
    """Insert events in a transaction of their own, in one round trip, if their sessions' heads are as expected.

    Args:
        connection: A connection without a transaction.
        insert: Made by `behind_heads`.
        active: Times to write as those of the sessions' last activity, in microseconds.

    Returns:
        Their ids; None when nothing was inserted: a session is gone, held by somebody else, or has another head.

    Raises:
        psycopg.errors.UniqueViolation: A number is taken, or an idempotency key is known. Nothing was inserted.
        psycopg.Error: It failed. If the connection is still usable, nothing was committed; otherwise nobody knows.
    """
    inserted, *_ = await connection.run(insert, *_touch(active))
    ids = inserted.get_value(0, 0)
    return None if ids is None else read_int8_array(ids)


def _touch(active: Mapping[int, int]) -> list[Command]:
    if not active:
        return []
    return [Command(_TOUCH, [int8_array(list(active)), timestamptz_array(list(active.values()))])]


def _columns(events: Sequence[Event]) -> list[bytes]:
    """Return the parameters for `_COLUMNS`."""
    contents = [event.content for event in events]
    return [
        int8_array([event.session_id for event in events]),
        int8_array([event.server_seq for event in events]),
        timestamptz_array([event.created_at for event in events]),
        bytea_array([event.chain_hash for event in events]),
        *(column.pack(list(map(column.value, contents))) for column in CONTENT_COLUMNS),
        bytea_array(list(map(envelope, events))),
    ]


def _value(result: PGresult, row: int, column: int) -> bytes:
    value = result.get_value(row, column)
    assert value is not None
    return value
