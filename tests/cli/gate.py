"""Stops an append at a chosen number, for as long as a test wants."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psycopg

_LOCK = 4242
_SECONDS = 30.0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fail after a while."""
    deadline = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen within {_SECONDS} s"
        time.sleep(0.005)


class Gate:
    """A gate in the database through which the events of a session up to a number pass, and no others until it opens.

    What is appended behind waits within its transaction: the service has it, and has not answered.
    """

    def __init__(self, database_url: str, session_id: int, *, after: int) -> None:
        """Close it."""
        self._connection = psycopg.connect(database_url, autocommit=True)
        self._connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        self._connection.execute(
            f"""
            CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock({_LOCK}); RETURN NEW; END $$;
            CREATE TRIGGER gate BEFORE INSERT ON collab_events FOR EACH ROW
            WHEN (NEW.session_id = {session_id} AND NEW.server_seq > {after}) EXECUTE FUNCTION gate()
            """.encode()
        )

    def wait_for_knock(self) -> None:
        """Wait until an append stands before it."""
        wait_until(lambda: self._count("locktype = 'advisory' AND NOT granted") > 0, "an append behind the gate")

    def open(self) -> None:
        """Let through what waits, and all that comes, and wait until what waited is through."""
        self._connection.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
        wait_until(lambda: self._count("locktype = 'advisory'") == 0, "the end of what waited")

    def _count(self, condition: str) -> int:
        mine = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        row = self._connection.execute(
            f"SELECT count(*) FROM pg_locks WHERE {mine} AND {condition}".encode()
        ).fetchone()
        assert row is not None
        return int(row[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.execute("SELECT pg_advisory_unlock_all()")
        self._connection.execute("DROP FUNCTION gate CASCADE")
        self._connection.close()
