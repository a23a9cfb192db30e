"""Sessions and events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create both tables, their indexes, and the trigger that takes events along with their session."""
    op.create_table(
        "collab_sessions",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("language_id", sa.BigInteger),
        sa.Column("owner_id", sa.Text),
        sa.Column("room", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("last_active", _TIME, nullable=False),
        sa.Column("deleted_at", _TIME),
        sa.PrimaryKeyConstraint("id", name="collab_sessions_pkey"),
        sa.UniqueConstraint("room", name="collab_sessions_room_key"),
    )
    live = sa.text("deleted_at IS NULL")
    by_activity = [sa.text("last_active DESC"), sa.text("id DESC")]
    for name, first in (("last_active", []), ("language", ["language_id"]), ("owner", ["owner_id"])):
        columns = [*map(sa.text, first), *by_activity]
        op.create_index(f"collab_sessions_{name}_idx", "collab_sessions", columns, postgresql_where=live)
    op.create_index(
        "collab_sessions_deleted_idx",
        "collab_sessions",
        ["id"],
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )

    op.create_table(
        "collab_events",
        sa.Column("session_id", sa.BigInteger, nullable=False),
        sa.Column("server_seq", sa.BigInteger, nullable=False),
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("actor_id", sa.Text),
        sa.Column("client_seq", sa.BigInteger),
        sa.Column("type", sa.Text),
        sa.Column("payload_json", sa.Text),
        sa.Column("payload_binary", sa.LargeBinary),
        sa.Column("hash", sa.Text),
        sa.Column("signature", sa.LargeBinary),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("chain_hash", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "server_seq", name="collab_events_pkey"),
        sa.CheckConstraint("(payload_json IS NULL) <> (payload_binary IS NULL)", name="collab_events_payload_check"),
    )
    op.create_index(
        "collab_events_client_seq_idx",
        "collab_events",
        ["session_id", "client_seq"],
        postgresql_where=sa.text("client_seq IS NOT NULL"),
    )
    op.create_index(
        "collab_events_idempotency_key_idx",
        "collab_events",
        ["session_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )

    # For rows deleted by hand. The service removes events in steps before it deletes a session's row.
    op.execute("""
        CREATE FUNCTION collab_delete_events_of_sessions() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            DELETE FROM collab_events e USING deleted_sessions s WHERE e.session_id = s.id;
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER collab_sessions_delete_events
        AFTER DELETE ON collab_sessions REFERENCING OLD TABLE AS deleted_sessions
        FOR EACH STATEMENT EXECUTE FUNCTION collab_delete_events_of_sessions()
    """)


def downgrade() -> None:
    """Drop everything, events included."""
    op.drop_table("collab_events")
    op.drop_table("collab_sessions")
    op.execute("DROP FUNCTION collab_delete_events_of_sessions()")
