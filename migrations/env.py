"""Runs the migrations on the connection that `collab_service.storage.schema` hands over."""

from alembic import context

from collab_service.storage.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run the migrations with: collab migrate --database-url URL")

context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
