"""Translates what the driver raises into our own errors, in one place.

SQLSTATE codes: https://www.postgresql.org/docs/18/errcodes-appendix.html
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from collab_service.model.errors import (
    CollabError,
    DatabaseUnreachable,
    DiskFull,
    LockTimeout,
    Overloaded,
    ReadOnlyServer,
    StorageUnavailable,
    TooManyConnections,
    TransactionConflict,
)

_BY_SQLSTATE: dict[str, type[StorageUnavailable]] = {
    "25006": ReadOnlyServer,  # read_only_sql_transaction
    "40001": TransactionConflict,  # serialization_failure
    "40P01": TransactionConflict,  # deadlock_detected
    "42501": StorageUnavailable,  # insufficient_privilege
    "53100": DiskFull,  # disk_full
    "53300": TooManyConnections,  # too_many_connections
    "55P03": LockTimeout,  # lock_not_available
    "57014": LockTimeout,  # query_canceled, as by statement_timeout
    "57P01": DatabaseUnreachable,  # admin_shutdown
    "57P02": DatabaseUnreachable,  # crash_shutdown
    "57P03": DatabaseUnreachable,  # cannot_connect_now
    "57P04": DatabaseUnreachable,  # database_dropped
    "57P05": DatabaseUnreachable,  # idle_session_timeout
    "25P03": DatabaseUnreachable,  # idle_in_transaction_session_timeout
}
_BY_CLASS: dict[str, type[StorageUnavailable]] = {
    "08": DatabaseUnreachable,  # connection exceptions
    "28": DatabaseUnreachable,  # invalid authorization
    "3D": DatabaseUnreachable,  # no such database
    "53": StorageUnavailable,  # insufficient resources
    "58": StorageUnavailable,  # system errors, such as I/O
}
# libpq keeps no SQLSTATE of a connection that was refused, so there only the text is left; in a server that speaks
# another language than English it is taken for unreachable. The texts are those of src/backend/storage/lmgr/proc.c and
# src/backend/utils/init/ (postinit.c, miscinit.c).
_NO_CONNECTION_LEFT = (
    "too many clients already",
    "too many connections for",
    "remaining connection slots are reserved",
)
# Those of src/backend/libpq/auth.c, and libpq's own.
_REFUSALS = ("authentication failed for user", "no pg_hba.conf entry", "pg_hba.conf rejects", "no password supplied")
# A parameter of the URL that cannot be: libpq's words (src/interfaces/libpq/fe-connect.c), and the server's of its
# settings in `options` (src/backend/utils/misc/guc.c, src/backend/tcop/postgres.c).
_WRONG_URL = re.compile(
    r"invalid \S+ value|definition of service .* not found|could not match \d+ |"
    r"invalid value for parameter|unrecognized configuration parameter|invalid command-line argument"
)
_WAITS_FOR_STANDBY = "SyncRepWaitForLSN"
"""The function that waits for a synchronous standby (PostgreSQL's src/backend/replication/syncrep.c)."""


def translate(error: BaseException) -> CollabError | None:
    """Return our error for a driver's, or None when it is not the database's state but a fault of ours."""
    if isinstance(error, PoolTimeout):
        return Overloaded("every database connection of this server is busy")
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, OSError):
        return DatabaseUnreachable()
    if not isinstance(error, psycopg.Error):
        return None
    sqlstate = error.sqlstate
    if sqlstate is None:
        # The connection could not be made, or is gone.
        if not isinstance(error, psycopg.OperationalError):
            return None
        return (
            TooManyConnections() if any(words in str(error) for words in _NO_CONNECTION_LEFT) else DatabaseUnreachable()
        )
    kind = _BY_SQLSTATE.get(sqlstate) or _BY_CLASS.get(sqlstate[:2])
    return kind() if kind else None


def cause_of(error: CollabError) -> str:
    """Return what the driver said, for those who run the service: without the statement, in one line."""
    cause = error.__cause__
    if isinstance(cause, DBAPIError) and cause.orig is not None:
        cause = cause.orig
    return " ".join(str(cause or error).split())


def is_refusal(cause: str) -> bool:
    """Tell whether the driver's words say that the server does not let this user in, which waiting does not change."""
    return any(words in cause for words in _REFUSALS)


def is_wrong_url(cause: str) -> bool:
    """Tell whether the driver's words are of a wrong parameter in the database URL, which waiting does not change."""
    return _WRONG_URL.search(cause) is not None


def is_of_standby(notice: psycopg.errors.Diagnostic) -> bool:
    """Tell whether a notice may say that a commit no longer waits for its synchronous standby.

    Warnings come of other things, too, such as a database in which nothing has been vacuumed for too long, or a
    trigger. The place in PostgreSQL's source is the only thing that does not change with the language.
    """
    return notice.severity_nonlocalized == "WARNING" and notice.source_function in (None, _WAITS_FOR_STANDBY)


@contextmanager
def driver_errors() -> Iterator[None]:
    """Raise our own errors for the driver's, with the driver's as the cause."""
    try:
        yield
    except CollabError:
        raise
    except Exception as error:
        if (ours := translate(error)) is not None:
            raise ours from error
        raise
