"""Events carry their message up to its payload."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column, without a value and so without touching a row. Versions that don't know it go on as they are."""
    op.add_column("collab_events", sa.Column("envelope", sa.LargeBinary))
    # The columns are the truth. The service changes no event; whoever does it by hand takes away what was made of it.
    op.execute("""
        CREATE FUNCTION collab_drop_envelope() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.envelope := NULL;
            RETURN NEW;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER collab_events_drop_envelope
        BEFORE UPDATE ON collab_events FOR EACH ROW
        WHEN (NEW.envelope IS NOT DISTINCT FROM OLD.envelope)
        EXECUTE FUNCTION collab_drop_envelope()
    """)


def downgrade() -> None:
    """Drop the column: whatever it says, the others say as well."""
    op.execute("DROP TRIGGER collab_events_drop_envelope ON collab_events")
    op.execute("DROP FUNCTION collab_drop_envelope()")
    op.drop_column("collab_events", "envelope")
