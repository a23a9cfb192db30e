"""The schema's version: bringing a database up to it, and telling whether one is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import OperationalError

import collab_service
from collab_service.storage.database import libpq_url
from collab_service.storage.driver_errors import driver_errors

_MIGRATION_LOCK = 0x636F6C6C6162  # "collab" in ASCII: any number that is ours alone in this database
_LOCK_LOOK = 0.2
"""Seconds between looks whether another migration is done."""
_LOCK_TIMEOUT = "2s"
_LOCK_PAUSE = 1.0
"""Seconds to let others work before a lock is asked for again."""
_ATTEMPTS = 10


class SchemaState(Enum):
    """How a database's schema compares with what this version of the service needs."""

    MISSING = "missing"
    OLDER = "older"
    CURRENT = "current"
    NEWER = "newer"


class UnsuitableDatabase(Exception):
    """The database cannot serve, whatever its state; the message is a sentence that says why and what to do."""


def migrate(url: str, *, target: str = "head") -> tuple[str | None, str | None]:
    """Migrate the database to `target` and return the revisions before and after.

    Safe when several processes start at once: an advisory lock lets one work, and the others then find nothing to do.
    Safe while servers work: whoever asks for a lock on a table makes everybody behind it wait, so a statement waits two
    seconds for one at most. The step is then undone, and tried again a moment later, some times.

    Raises:
        LockTimeout: A table was locked by others all the time. What was done before is kept.
        StorageUnavailable: The database cannot be reached or takes no writes.
        UnsuitableDatabase: It is not encoded in UTF-8.
    """
    with _connect(url) as connection:
        # Asked for again and again: a statement that waits holds a snapshot, and CREATE INDEX CONCURRENTLY waits for
        # all of those, so that the two would wait for each other.
        while not _ask(connection, "SELECT pg_try_advisory_lock(:key)", key=_MIGRATION_LOCK):
            time.sleep(_LOCK_LOOK)
        # The lock ends with the connection.
        _ask(connection, "SELECT set_config('lock_timeout', :time, false)", time=_LOCK_TIMEOUT)
        before = _revision(connection)
        script = _script()
        known = {revision.revision for revision in script.walk_revisions()}
        if target == "head" and before is not None and before not in known:
            return before, before  # a newer version of the service has been here
        _move(connection, target)
        return before, _revision(connection)


def _move(connection: Connection, target: str) -> None:
    move = command.downgrade if target == "base" else command.upgrade
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            move(_config(connection), target)
            return
        except OperationalError as error:
            if attempt == _ATTEMPTS or not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            connection.rollback()
            time.sleep(_LOCK_PAUSE)


def _ask(connection: Connection, statement: str, **parameters: str | int) -> Any:
    """Return what a statement says, in a transaction of its own."""
    answer = connection.execute(text(statement), parameters).scalar()
    connection.commit()
    return answer


def schema_state(url: str) -> SchemaState:
    """Compare the database's schema with what this version needs.

    Raises:
        StorageUnavailable: The database cannot be reached.
        UnsuitableDatabase: It is not encoded in UTF-8.
    """
    with _connect(url) as connection:
        found = _revision(connection)
    script = _script()
    if found is None:
        return SchemaState.MISSING
    if found == script.get_current_head():
        return SchemaState.CURRENT
    known = {revision.revision for revision in script.walk_revisions()}
    return SchemaState.OLDER if found in known else SchemaState.NEWER


@contextmanager
def _connect(url: str) -> Iterator[Connection]:
    def creator() -> psycopg.Connection:
        connection = psycopg.connect(
            libpq_url(url), connect_timeout=5, application_name="collab-migrate", client_encoding="UTF8"
        )
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            connection.close()
            raise UnsuitableDatabase(
                f"the database is encoded in {encoding}, which cannot hold every text; make one with: "
                "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )
        return connection

    engine = create_engine("postgresql+psycopg://", creator=creator, poolclass=pool.NullPool)
    with driver_errors(), engine.connect() as connection:
        yield connection


def _revision(connection: Connection) -> str | None:
    revision = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()
    return revision


def _config(connection: Connection | None = None) -> Config:
    package = Path(collab_service.__file__).parent
    # In a wheel the migrations lie inside the package, in the repository beside it.
    inside = package / "migrations"
    config = Config()
    config.set_main_option("script_location", str(inside if inside.is_dir() else package.parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
