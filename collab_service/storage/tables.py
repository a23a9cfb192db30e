"""The tables, as the newest migration leaves them (a test holds the two together).

Every statement is keyed by `session_id`, so that the events can be distributed by it one day. An event has no foreign
key to its session: the check costs 40 % of the insert rate, and appending holds the session's row lock anyway. A
statement-level trigger takes the events along when a session's row is deleted by hand.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)

from collab_service.storage.times import Microseconds

metadata = MetaData()

sessions = Table(
    "collab_sessions",
    metadata,
    Column("id", BigInteger, Identity(), nullable=False),
    Column("language_id", BigInteger),
    Column("owner_id", Text),
    Column("room", Text),
    Column("created_at", Microseconds, nullable=False),
    Column("last_active", Microseconds, nullable=False),
    # Set when the session is deleted; the row and its events are removed afterwards, in bounded steps.
    Column("deleted_at", Microseconds),
    PrimaryKeyConstraint("id", name="collab_sessions_pkey"),
    UniqueConstraint("room", name="collab_sessions_room_key"),
)

IS_LIVE = "coalesce(deleted_at, 'infinity') = 'infinity'"
"""Whether a session that is looked up by its id was not deleted. In `deleted_at IS NULL` PostgreSQL would recognise the
condition of the indexes below, which hold the id as well, though last; and while it knows nothing of the table it reads
the whole of one of them, rather than look into the primary key."""

_live = sessions.c.deleted_at.is_(None)
Index(
    "collab_sessions_last_active_idx",
    sessions.c.last_active.desc(),
    sessions.c.id.desc(),
    postgresql_where=_live,
)
Index(
    "collab_sessions_language_idx",
    sessions.c.language_id,
    sessions.c.last_active.desc(),
    sessions.c.id.desc(),
    postgresql_where=_live,
)
Index(
    "collab_sessions_owner_idx",
    sessions.c.owner_id,
    sessions.c.last_active.desc(),
    sessions.c.id.desc(),
    postgresql_where=_live,
)
Index("collab_sessions_deleted_idx", sessions.c.id, postgresql_where=sessions.c.deleted_at.is_not(None))

events = Table(
    "collab_events",
    metadata,
    Column("session_id", BigInteger, nullable=False),
    Column("server_seq", BigInteger, nullable=False),
    Column("id", BigInteger, Identity(), nullable=False),
    Column("actor_id", Text),
    Column("client_seq", BigInteger),
    Column("type", Text),
    Column("payload_json", Text),
    Column("payload_binary", LargeBinary),
    Column("hash", Text),
    Column("signature", LargeBinary),
    Column("idempotency_key", Text),
    Column("created_at", Microseconds, nullable=False),
    Column("chain_hash", LargeBinary, nullable=False),
    # The message up to its payload, made for the insert. None where an older version of the service has inserted, or
    # somebody has changed the row (a trigger sees to that).
    Column("envelope", LargeBinary),
    PrimaryKeyConstraint("session_id", "server_seq", name="collab_events_pkey"),
    CheckConstraint("(payload_json IS NULL) <> (payload_binary IS NULL)", name="collab_events_payload_check"),
)

Index(
    "collab_events_client_seq_idx",
    events.c.session_id,
    events.c.client_seq,
    postgresql_where=events.c.client_seq.is_not(None),
)
Index(
    "collab_events_idempotency_key_idx",
    events.c.session_id,
    events.c.idempotency_key,
    unique=True,
    postgresql_where=events.c.idempotency_key.is_not(None),
)
