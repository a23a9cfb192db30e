"""Runs the migrations on the connection that `collab_service.storage.schema` hands over."""

from alembic import context

from collab_service.storage.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run the migrations with: collab migrate --database-url URL")

# A transaction for each step, so that one can leave it with autocommit_block, as for CREATE INDEX CONCURRENTLY.
context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
