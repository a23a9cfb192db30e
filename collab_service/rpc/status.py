"""From our errors to what gRPC sends: a `google.rpc.Status` with its details.

The errors' model is that of https://google.aip.dev/193.
"""

from dataclasses import dataclass
from functools import lru_cache

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from collab_service.model.errors import CollabError, InvalidArgument, Overloaded, Reason
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1 import error_reason_pb2 as pb_reason

DOMAIN = "collab_service"
DETAILS_KEY = "grpc-status-details-bin"

# Everything about an error travels in the trailing metadata, for which clients have 8 KiB unless configured.
_MAX_VIOLATIONS_BYTES = 2_048
_MAX_VIOLATIONS = 100
"""In a stream, where they travel in a message, which has more room."""
_MAX_METADATA_VALUE = 1_024
_MAX_MESSAGE = 400

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PAYLOAD_NOT_A_JSON_OBJECT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PAGE_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.EVENT_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BATCH_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.IDEMPOTENCY_KEY_REUSED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SESSION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.SERVER_SEQ_CONFLICT: grpc.StatusCode.ABORTED,
    Reason.SERVER_SEQ_BEYOND_HEAD: grpc.StatusCode.OUT_OF_RANGE,
    Reason.SERVER_SEQ_COMPACTED: grpc.StatusCode.OUT_OF_RANGE,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_FOLLOWERS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STORAGE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.COMMIT_OUTCOME_UNKNOWN: grpc.StatusCode.UNAVAILABLE,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed call is answered with."""

    code: grpc.StatusCode
    reason: Reason
    message: str
    details: bytes
    """A serialized `google.rpc.Status`."""


def failure_of(error: CollabError) -> Failure:
    """Return the answer for one of our errors."""
    if isinstance(error, Overloaded):
        return _refusal(str(error))
    return _failure_of(error)


@lru_cache(64)
def _refusal(message: str) -> Failure:
    """Return the answer for one of a few errors that are sent by the thousand, so that making it would be felt."""
    return _failure_of(Overloaded(message))


def _failure_of(error: CollabError) -> Failure:
    details: list[Message] = []
    if isinstance(error, InvalidArgument):
        details.append(_bad_request(error))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromMicroseconds(int(error.retry_after * 1_000_000))
        details.append(RetryInfo(retry_delay=delay))
    return _failure(error.reason, str(error), _metadata(error), details)


def internal_failure(error_id: str) -> Failure:
    """Return the answer for a fault of ours: nothing but an id that stands in the log."""
    message = f"internal error; the server's log says more about {error_id}"
    return _failure(Reason.INTERNAL, message, {"error_id": error_id, "side_effects": "none"}, [])


def append_failure(error: CollabError) -> pb.AppendFailure:
    """Return the answer within an `AppendStream`: what `failure_of` would say, the bad fields among the metadata."""
    metadata = _metadata(error)
    if isinstance(error, InvalidArgument):
        for violation in error.violations[:_MAX_VIOLATIONS]:
            metadata[violation.field] = _cut(violation.message, _MAX_MESSAGE)
    return pb.AppendFailure(
        code=CODES[error.reason].value[0],
        reason=pb_reason.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
        message=_cut(str(error), _MAX_MESSAGE),
        metadata=metadata,
    )


def _cut_list(value: str, most: int) -> str:
    """Shorten a value; one that is a list of numbers ends with a whole one."""
    cut = _cut(value, most)
    return cut if cut == value or "," not in cut else cut.rpartition(",")[0]


def _metadata(error: CollabError) -> dict[str, str]:
    metadata = {name: _cut_list(value, _MAX_METADATA_VALUE) for name, value in error.metadata.items()}
    return {**metadata, "side_effects": "unknown" if error.may_have_been_written else "none"}


def _failure(reason: Reason, message: str, metadata: dict[str, str], more: list[Message]) -> Failure:
    code = CODES[reason]
    message = _cut(message, _MAX_MESSAGE)
    info = ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    status = Status(code=code.value[0], message=message)
    for detail in (info, *more):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(code, reason, message, status.SerializeToString())


def _bad_request(error: InvalidArgument) -> BadRequest:
    bad = BadRequest()
    for told, violation in enumerate(error.violations):
        if bad.ByteSize() > _MAX_VIOLATIONS_BYTES:
            rest = len(error.violations) - told
            bad.field_violations.add(field="*", description=f"and {rest} more bad fields")
            break
        bad.field_violations.add(
            field=violation.field, description=_cut(violation.message, _MAX_MESSAGE), reason=violation.reason
        )
    return bad


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
