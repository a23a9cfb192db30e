"""Everything that can go wrong, as one tree.

::

    CollabError
    ├── InvalidArgument              (violations: which fields, and what would be right)
    │   └── IdempotencyKeyReused
    ├── SessionNotFound
    ├── ServerSeqConflict
    ├── ServerSeqBeyondHead
    ├── Overloaded
    │   └── ReaderStalled
    ├── TooManyFollowers
    ├── ShuttingDown
    ├── CommitOutcomeUnknown         (the only one after which something may have been written)
    └── StorageUnavailable
        ├── DatabaseUnreachable
        ├── TooManyConnections
        ├── ReadOnlyServer
        ├── DiskFull
        ├── LockTimeout
        └── TransactionConflict      (deadlock or serialization failure: the same transaction may succeed)

The first line of a class's docstring is its default message. What is not a `CollabError` is a fault of ours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """The machine-readable reason of an error; `ErrorReason` in the protos, which explains each."""

    INVALID_REQUEST = "INVALID_REQUEST"
    PAYLOAD_NOT_A_JSON_OBJECT = "PAYLOAD_NOT_A_JSON_OBJECT"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    EVENT_TOO_LARGE = "EVENT_TOO_LARGE"
    BATCH_TOO_LARGE = "BATCH_TOO_LARGE"
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED"
    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    SERVER_SEQ_CONFLICT = "SERVER_SEQ_CONFLICT"
    SERVER_SEQ_BEYOND_HEAD = "SERVER_SEQ_BEYOND_HEAD"
    SERVER_SEQ_COMPACTED = "SERVER_SEQ_COMPACTED"
    OVERLOADED = "OVERLOADED"
    TOO_MANY_FOLLOWERS = "TOO_MANY_FOLLOWERS"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    COMMIT_OUTCOME_UNKNOWN = "COMMIT_OUTCOME_UNKNOWN"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field of a request."""

    field: str
    """The path of the field, such as `events[3].actor_id`."""
    message: str
    """What is wrong and what would be right."""
    reason: Reason = Reason.INVALID_REQUEST


class CollabError(Exception):
    """Something went wrong."""

    reason: ClassVar[Reason]
    retry_after: ClassVar[float | None] = None
    """Seconds to wait before the same call may succeed; None where waiting does not help."""
    may_have_been_written: bool = False

    def __init__(self, message: str | None = None, **metadata: str | int) -> None:
        super().__init__(message or (self.__doc__ or "").partition("\n")[0])
        self.metadata: Mapping[str, str] = {name: str(value) for name, value in metadata.items()}


class InvalidArgument(CollabError):
    """The request is not valid."""

    reason = Reason.INVALID_REQUEST

    def __init__(self, violations: Iterable[Violation], message: str | None = None, **metadata: str) -> None:
        self.violations = tuple(violations)
        reasons = {violation.reason for violation in self.violations}
        if len(reasons) == 1:
            self.reason = reasons.pop()  # type: ignore[misc]  # the class says what it is when reasons mix
        super().__init__(message or self._summary(), **metadata)

    def _summary(self) -> str:
        first, more = self.violations[0], len(self.violations) - 1
        tail = f" (and {more} more)" if more else ""
        return f"{first.field}: {first.message}{tail}"


class IdempotencyKeyReused(InvalidArgument):
    """The idempotency key is already stored in this session with other content."""

    def __init__(self, known_indexes: Iterable[int], field: str = "events[{}].idempotency_key") -> None:
        """Tell which events of the batch have a key that is stored already; `field` is the path of a key."""
        self._known_indexes = tuple(known_indexes)
        message = "is already stored in this session with other content; use a new key for new content"
        super().__init__(
            [Violation(field.format(i), message, Reason.IDEMPOTENCY_KEY_REUSED) for i in self._known_indexes],
            known_indexes=",".join(map(str, self._known_indexes)),
        )

    def of_single_event(self) -> "IdempotencyKeyReused":
        """Return the same error for a call that takes one event and no batch."""
        return IdempotencyKeyReused(self._known_indexes, field="event.idempotency_key")


class SessionNotFound(CollabError):
    """There is no such session."""

    reason = Reason.SESSION_NOT_FOUND

    def __init__(self, *, session_id: int | None = None, room: str | None = None) -> None:
        if room is None:
            super().__init__(f"there is no session {session_id}", session_id=session_id or 0)
        else:
            super().__init__("there is no session with this room", room=room)


class ServerSeqConflict(CollabError):
    """The session's last number is not the expected one."""

    reason = Reason.SERVER_SEQ_CONFLICT

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(
            f"expected_last_server_seq is {expected}, but the session's last number is {actual}; "
            "read what is new and decide again",
            expected=expected,
            actual=actual,
        )


class ServerSeqBeyondHead(CollabError):
    """The session has not reached this number."""

    reason = Reason.SERVER_SEQ_BEYOND_HEAD

    def __init__(self, since: int, head: int) -> None:
        super().__init__(
            f"since_server_seq is {since}, but the session's last number is {head}", since=since, head=head
        )


class Overloaded(CollabError):
    """More work is waiting than the server accepts."""

    reason = Reason.OVERLOADED
    retry_after = 0.1


class ReaderStalled(Overloaded):
    """The reader took no message for too long; read on from the last number seen."""


class TooManyFollowers(CollabError):
    """This server has as many followers as it accepts; another may have room."""

    reason = Reason.TOO_MANY_FOLLOWERS
    retry_after = 1.0


class ShuttingDown(CollabError):
    """The server is stopping."""

    reason = Reason.SHUTTING_DOWN
    retry_after = 0.5


class CommitOutcomeUnknown(CollabError):
    """The database, or its standby, was lost during a commit; what was sent may or may not be stored."""

    reason = Reason.COMMIT_OUTCOME_UNKNOWN
    retry_after = 1.0
    may_have_been_written = True


class StorageUnavailable(CollabError):
    """The database cannot do this now."""

    reason = Reason.STORAGE_UNAVAILABLE
    retry_after = 1.0


class DatabaseUnreachable(StorageUnavailable):
    """The database cannot be reached."""


class TooManyConnections(StorageUnavailable):
    """The database has no connection left."""


class ReadOnlyServer(StorageUnavailable):
    """The database accepts no writes: it is a standby, or set to read only."""


class DiskFull(StorageUnavailable):
    """The database has no space left."""


class LockTimeout(StorageUnavailable):
    """Somebody else has held a lock, or a statement has taken, for too long."""


class TransactionConflict(StorageUnavailable):
    """The database has broken a transaction off in favour of another."""

    retry_after = 0.05
