"""Statements about sessions. Deleted ones (marked, not yet removed) are never seen, but by `find_deleted`."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Row, and_, func, literal, select, text, true, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from collab_service.model import ListPosition, Session
from collab_service.model.chain import chain_start
from collab_service.storage.tables import IS_LIVE, events, sessions
from collab_service.storage.times import Microseconds

_head = (
    select(events.c.server_seq, events.c.created_at, events.c.chain_hash)
    .where(events.c.session_id == sessions.c.id)
    .order_by(events.c.server_seq.desc())
    .limit(1)
    .lateral("head")
)
_select_sessions = select(
    sessions.c.id,
    sessions.c.language_id,
    sessions.c.owner_id,
    sessions.c.room,
    sessions.c.created_at,
    sessions.c.last_active,
    _head.c.server_seq.label("head_seq"),
    _head.c.created_at.label("head_time"),
    _head.c.chain_hash.label("head_chain"),
).select_from(sessions.outerjoin(_head, true()))
_is_live = text(IS_LIVE)


def _session(row: Row[*tuple[Any, ...]]) -> Session:
    return Session(
        id=row.id,
        language_id=row.language_id,
        owner_id=row.owner_id,
        room=row.room,
        created_at=row.created_at,
        # The row's own time is written at most once a second; the last event may be newer.
        last_active=row.last_active if row.head_time is None else max(row.last_active, row.head_time),
        first_server_seq=1,
        last_server_seq=row.head_seq or 0,
        chain_hash=row.head_chain or chain_start(row.id),
    )


async def create_session(
    connection: AsyncConnection, *, language_id: int | None, owner_id: str | None, room: str | None, now: int
) -> int | None:
    """Insert a session and return its id; None when the room is taken, also by a transaction that just committed."""
    statement = (
        insert(sessions)
        .values(language_id=language_id, owner_id=owner_id, room=room, created_at=now, last_active=now)
        .on_conflict_do_nothing(index_elements=[sessions.c.room])
        .returning(sessions.c.id)
    )
    session_id: int | None = (await connection.execute(statement)).scalar_one_or_none()
    return session_id


async def get_session(connection: AsyncConnection, session_id: int) -> Session | None:
    """Return a session by its id."""
    row = (await connection.execute(_select_sessions.where(sessions.c.id == session_id, _is_live))).one_or_none()
    return row and _session(row)


async def get_session_by_room(connection: AsyncConnection, room: str) -> Session | None:
    """Return a session by its room."""
    row = (await connection.execute(_select_sessions.where(sessions.c.room == room, _is_live))).one_or_none()
    return row and _session(row)


async def list_sessions(
    connection: AsyncConnection,
    *,
    language_id: int | None,
    owner_id: str | None,
    after: ListPosition | None,
    count: int,
) -> list[tuple[Session, ListPosition]]:
    """Return at most `count` sessions, the most recently active first, each with its place.

    The order is that of the stored time, which is indexed.
    """
    statement = (
        _select_sessions.where(sessions.c.deleted_at.is_(None))
        .order_by(sessions.c.last_active.desc(), sessions.c.id.desc())
        .limit(count)
    )
    if language_id is not None:
        statement = statement.where(sessions.c.language_id == language_id)
    if owner_id is not None:
        statement = statement.where(sessions.c.owner_id == owner_id)
    if after is not None:
        place = tuple_(literal(after.last_active, Microseconds), literal(after.session_id, BigInteger))
        statement = statement.where(tuple_(sessions.c.last_active, sessions.c.id) < place)
    rows = (await connection.execute(statement)).all()
    return [(_session(row), ListPosition(row.last_active, row.id)) for row in rows]


async def touch_session(connection: AsyncConnection, session_id: int, now: int) -> None:
    """Move a session's activity to `now`, if there is such a session."""
    await record_activity(connection, {session_id: now})


async def record_activity(connection: AsyncConnection, times: Mapping[int, int], *, wait: bool = True) -> list[int]:
    """Move sessions' activity forward to the given times, never back, where there are such sessions.

    The rows are locked in the order of their ids, as appending does, so that nobody can deadlock.

    Args:
        connection: Where to.
        times: Microseconds by session id.
        wait: Wait for rows that others hold; otherwise leave them out.

    Returns:
        The ids of those that were left out.
    """
    ids = await _lock_sessions(connection, list(times), wait=wait)
    given = select(
        func.unnest(literal(ids, ARRAY(BigInteger))).label("id"),
        func.unnest(literal([times[i] for i in ids], ARRAY(Microseconds))).label("at"),
    ).subquery()
    await connection.execute(
        update(sessions)
        .values(last_active=given.c.at)
        .where(_are_there(ids), sessions.c.id == given.c.id, sessions.c.last_active < given.c.at)
    )
    left_out = list(times.keys() - ids)
    if wait or not left_out:
        return []
    return list((await connection.execute(select(sessions.c.id).where(_are_there(left_out)))).scalars())


async def _lock_sessions(connection: AsyncConnection, ids: Sequence[int], *, wait: bool) -> list[int]:
    statement = (
        select(sessions.c.id).where(_are_there(ids)).order_by(sessions.c.id).with_for_update(skip_locked=not wait)
    )
    return list((await connection.execute(statement)).scalars())


def _are_there(ids: Sequence[int]) -> ColumnElement[bool]:
    return and_(sessions.c.id == func.any(literal(list(ids), ARRAY(BigInteger))), _is_live)


async def mark_deleted(connection: AsyncConnection, session_id: int, now: int) -> bool:
    """Delete a session for everybody to see, and free its room; its rows stay until they are removed.

    Waits for an append that holds the session; those that come later no longer find it. False when there is none.
    """
    statement = update(sessions).values(deleted_at=now, room=None).where(sessions.c.id == session_id, _is_live)
    return (await connection.execute(statement)).rowcount > 0


async def release_sessions(connection: AsyncConnection, owner_id: str, *, after: int, count: int) -> list[int]:
    """Take the owner off at most `count` of their sessions above the id `after`; return those, in order."""
    statement = (
        select(sessions.c.id)
        .where(sessions.c.owner_id == owner_id, sessions.c.deleted_at.is_(None), sessions.c.id > after)
        .order_by(sessions.c.id)
        .limit(count)
        .with_for_update()
    )
    ids = list((await connection.execute(statement)).scalars())
    await connection.execute(
        update(sessions).values(owner_id=None).where(sessions.c.id == func.any(literal(ids, ARRAY(BigInteger))))
    )
    return ids


async def find_deleted(connection: AsyncConnection) -> tuple[int, int, int] | None:
    """Lock one session that is marked deleted and return its id and the first and last number left (0, 0 if none).

    Sessions that another process is removing are passed over. None when there is nothing to remove.
    """
    row = (
        await connection.execute(
            select(sessions.c.id)
            .where(sessions.c.deleted_at.is_not(None))
            .order_by(sessions.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
    ).one_or_none()
    if row is None:
        return None
    of_session = events.c.session_id == row.id
    first, last = (
        await connection.execute(
            select(
                *(
                    select(events.c.server_seq).where(of_session).order_by(order).limit(1).scalar_subquery()
                    for order in (events.c.server_seq.asc(), events.c.server_seq.desc())
                )
            )
        )
    ).one()
    return row.id, first or 0, last or 0


async def remove_events(connection: AsyncConnection, session_id: int, first: int, last: int) -> None:
    """Delete the rows of a deleted session's events from `first` to `last`."""
    # By range: a step that looked for the first rows left would wade through those that the steps before made dead.
    await connection.execute(
        events.delete().where(
            and_(events.c.session_id == session_id, events.c.server_seq.between(first, last)),
        )
    )


async def remove_session(connection: AsyncConnection, session_id: int) -> None:
    """Delete the row of a deleted session."""
    await connection.execute(sessions.delete().where(sessions.c.id == session_id, sessions.c.deleted_at.is_not(None)))


async def set_lock_timeout(connection: AsyncConnection, seconds: float) -> None:
    """Bound how long the statements of this transaction wait for a lock."""
    await connection.execute(
        text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": f"{int(seconds * 1000)}ms"}
    )
