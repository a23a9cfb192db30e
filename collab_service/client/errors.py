"""What can go wrong with a call, as a small tree that says what to do.

::

    ServiceError                 (is_retryable, retry_after, side_effects)
    ├── InvalidRequest           correct the fields in `violations`
    │   ├── TooLarge             split the event or the batch
    │   └── IdempotencyKeyReused use a new key for new content
    ├── SessionNotFound
    ├── ServerSeqConflict        read up to `actual`, then decide again
    ├── ServerSeqBeyondHead      the session ends at `head`; was it restored?
    ├── ServerSeqCompacted       begin at `first`
    ├── Overloaded               wait
    ├── Unavailable              wait: the service, or its database, is not there
    │   └── OutcomeUnknown       the service could not find out whether it was written
    ├── DeadlineExceeded         there was no answer in time
    └── InternalError            a fault of the service; its log has `request_id`

The reasons are those of `ErrorReason` in the protos, which explains each.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.error_reason_pb2 import ErrorReason

SideEffects = Literal["none", "unknown"]

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"

# grpc tells only in words how far a call has come.
_NEVER_SENT = ("failed to connect to all ", "connections to all backends failing", "errors resolving ", "empty address")
"""How it begins to say that there was no connection to send the call on."""
_OVER_THE_LIMIT = "message larger than max"
_REFUSED_AS_TOO_LARGE = ("CLIENT: Sent message larger", "SERVER: Received message larger")
"""As it says of a request. An answer that is too large comes after the call was carried out."""


class Violation(NamedTuple):
    """One bad field of a request."""

    field: str
    """Its path, such as `events[3].actor_id`."""
    message: str
    """What is wrong and what would be right."""


class ServiceError(Exception):
    """A call failed."""

    is_retryable: ClassVar[bool] = False
    """Whether the same call may succeed later. The client has tried again already, for as long as it was given."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        side_effects: SideEffects = "none",
        retry_after: float | None = None,
        request_id: str = "",
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """The name of an `ErrorReason`, such as `SESSION_NOT_FOUND`; empty where the service itself gave no answer."""
        self.side_effects: SideEffects = side_effects
        """`none`: nothing was written. `unknown`: it may have been, now or soon; send an append again only with the
        idempotency key that it had, and read before anything else."""
        self.retry_after = retry_after
        """Seconds to wait before the call may succeed, where the service said so."""
        self.request_id = request_id
        """Names the call in the service's log; empty where the service gave no answer."""
        self.metadata = metadata or {}
        """The variables of the message."""

    def _number(self, name: str) -> int:
        return int(self.metadata.get(name, 0))


class InvalidRequest(ServiceError):
    """The request is not valid; sending it again never helps."""

    violations: tuple[Violation, ...] = ()
    """Every bad field."""


class TooLarge(InvalidRequest):
    """An event or a batch is over the limit."""


class IdempotencyKeyReused(InvalidRequest):
    """An idempotency key is stored in this session with other content."""


class SessionNotFound(ServiceError):
    """There is no such session (any more)."""


class ServerSeqConflict(ServiceError):
    """The session's last number is not the expected one."""

    @property
    def expected(self) -> int:
        """The number that was expected."""
        return self._number("expected")

    @property
    def actual(self) -> int:
        """The session's last number."""
        return self._number("actual")


class ServerSeqBeyondHead(ServiceError):
    """The session has not reached the number to read from, as after the restore of an older backup."""

    @property
    def head(self) -> int:
        """The session's last number."""
        return self._number("head")


class ServerSeqCompacted(ServiceError):
    """The events after the number to read from are no longer kept."""

    @property
    def first(self) -> int:
        """The first number that can be read."""
        return self._number("first")


class Overloaded(ServiceError):
    """More is asked of the service than it accepts."""

    is_retryable = True


class Unavailable(ServiceError):
    """The service does not answer, or cannot work just now."""

    is_retryable = True


class OutcomeUnknown(Unavailable):
    """The service lost its database during the commit, and could not find out whether it took place."""


class DeadlineExceeded(ServiceError):
    """There was no answer in time."""

    is_retryable = True


class InternalError(ServiceError):
    """A fault of the service, or an answer that it does not give."""


_BY_REASON: dict[str, type[ServiceError]] = {
    "EVENT_TOO_LARGE": TooLarge,
    "BATCH_TOO_LARGE": TooLarge,
    "IDEMPOTENCY_KEY_REUSED": IdempotencyKeyReused,
    "SERVER_SEQ_COMPACTED": ServerSeqCompacted,
    "COMMIT_OUTCOME_UNKNOWN": OutcomeUnknown,
}
_BY_CODE: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: SessionNotFound,
    grpc.StatusCode.ABORTED: ServerSeqConflict,
    grpc.StatusCode.OUT_OF_RANGE: ServerSeqBeyondHead,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


_BY_NUMBER: dict[int, type[ServiceError]] = {code.value[0]: kind for code, kind in _BY_CODE.items()}
_VARIABLES = {"known_indexes"}
"""What the metadata of an `INVALID_ARGUMENT` within a stream holds besides its bad fields."""


def error_of(rpc_error: grpc.RpcError, *, writes: bool) -> ServiceError:
    """Return what a failed RPC means.

    Args:
        rpc_error: As grpc raised it.
        writes: Whether the call may have written something, if the service does not say.
    """
    code: grpc.StatusCode = rpc_error.code()
    message: str = rpc_error.details() or ""
    trailing: Any = rpc_error.trailing_metadata()
    metadata: dict[str, Any] = dict(trailing or ())
    request_id = str(metadata.get(_REQUEST_ID_KEY, ""))
    details = metadata.get(_DETAILS_KEY)
    if details is None:  # the transport's own words
        kind = _BY_CODE.get(code, InternalError)
        if kind is Overloaded and _OVER_THE_LIMIT in message:
            kind = TooLarge
        elif code is grpc.StatusCode.NOT_FOUND:
            kind = InternalError
        text = message or "no details"
        if kind is Unavailable:
            text = f"the service does not answer: {text}"
        elif kind is InternalError:
            text = f"the service answered {code.name}: {text}"
        unwritten = (
            not writes
            or code is grpc.StatusCode.UNIMPLEMENTED
            or message.startswith(_NEVER_SENT)
            or any(words in message for words in _REFUSED_AS_TOO_LARGE)
        )
        return kind(text, side_effects="none" if unwritten else "unknown", request_id=request_id)
    status = Status.FromString(details)
    info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
    retry_after: float | None = None
    violations: list[Violation] = []
    for detail in status.details:
        if detail.Unpack(info):
            pass
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMicroseconds() / 1_000_000
        elif detail.Unpack(bad):
            violations += [Violation(field.field, field.description) for field in bad.field_violations]
    variables = dict(info.metadata)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, InternalError)
    error = kind(
        message,
        reason=info.reason,
        side_effects="unknown" if variables.pop("side_effects", "none") == "unknown" else "none",
        retry_after=retry_after,
        request_id=request_id,
        metadata=variables,
    )
    if isinstance(error, InvalidRequest):
        error.violations = tuple(violations)
    return error


def error_of_failure(failure: pb.AppendFailure) -> ServiceError:
    """Return what an `AppendFailure` means."""
    reason = ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    variables = dict(failure.metadata)
    side_effects: SideEffects = "unknown" if variables.pop("side_effects", "none") == "unknown" else "none"
    kind = _BY_REASON.get(reason) or _BY_NUMBER.get(failure.code, InternalError)
    error = kind(failure.message, reason=reason, side_effects=side_effects, metadata=variables)
    if isinstance(error, InvalidRequest):
        error.violations = tuple(Violation(*item) for item in sorted(variables.items()) if item[0] not in _VARIABLES)
    return error


def invalid(violations: Iterable[Violation]) -> InvalidRequest:
    """Return the error for a request that cannot even be sent."""
    violations = tuple(violations)
    error = InvalidRequest(
        "; ".join(f"{violation.field} {violation.message}" for violation in violations), reason="INVALID_REQUEST"
    )
    error.violations = violations
    return error
