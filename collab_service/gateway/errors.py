"""From errors to answers: one table from reasons to HTTP statuses, and field names as HTTP knows them."""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from itertools import islice

import msgspec
from starlette.responses import Response

from collab_service.client import (
    DeadlineExceeded,
    IdempotencyKeyReused,
    InternalError,
    InvalidRequest,
    Overloaded,
    ServerSeqBeyondHead,
    ServerSeqCompacted,
    ServerSeqConflict,
    ServiceError,
    SessionNotFound,
    TooLarge,
    Unavailable,
)
from collab_service.gateway.forms import Detail, ErrorAnswer

_STATUSES: Mapping[type[ServiceError], HTTPStatus] = {
    InvalidRequest: HTTPStatus.BAD_REQUEST,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    IdempotencyKeyReused: HTTPStatus.CONFLICT,
    SessionNotFound: HTTPStatus.NOT_FOUND,
    ServerSeqConflict: HTTPStatus.CONFLICT,
    ServerSeqBeyondHead: HTTPStatus.BAD_REQUEST,
    ServerSeqCompacted: HTTPStatus.GONE,
    Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineExceeded: HTTPStatus.SERVICE_UNAVAILABLE,
    InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_REASONS: Mapping[type[ServiceError], str] = {
    # Where the service has given none, because it did not answer.
    TooLarge: "BATCH_TOO_LARGE",
    Overloaded: "OVERLOADED",
    Unavailable: "STORAGE_UNAVAILABLE",
    DeadlineExceeded: "STORAGE_UNAVAILABLE",
}
_MOST_DETAILS = 100
_OUTCOME_UNKNOWN = "the service was lost before it answered; send it again only with the same idempotency key"

_NAMES = {
    "json": "payload",
    "binary": "payloadBase64",
    "events": "body",
}
_EVENT_PATH = re.compile(r"^event\.|^events(?=\[)|(?<=^types)\[\d+\]$")
_SNAKE = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")


class RequestError(Exception):
    """A request that the gateway itself refuses."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        details: Iterable[Detail] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = list(details)
        self.headers = dict(headers or {})


def invalid(details: Iterable[Detail]) -> RequestError:
    """Return the error for fields that are not what they should be."""
    details = list(islice(details, _MOST_DETAILS + 1))
    return RequestError(HTTPStatus.BAD_REQUEST, "INVALID_REQUEST", _summary(details), details)


def answer_to_error(error: RequestError) -> Response:
    """Return the answer to a request that was refused."""
    return _answer(error.status, error.code, str(error), error.details, error.headers)


def answer_to_service_error(error: ServiceError) -> Response:
    """Return the answer to a call that the service has refused, or could not carry out."""
    kind = next(kind for kind in type(error).__mro__ if kind in _STATUSES)
    status, code, message = _STATUSES[kind], error.reason or _REASONS.get(kind, "INTERNAL"), http_text(str(error))
    details: list[Detail] = []
    if isinstance(error, InvalidRequest) and error.violations:
        details = [Detail(http_name(field), http_text(message)) for field, message in error.violations]
        message = _summary(details)
    elif error.side_effects == "unknown" and not error.reason:
        status, code, message = HTTPStatus.SERVICE_UNAVAILABLE, "COMMIT_OUTCOME_UNKNOWN", _OUTCOME_UNKNOWN
    elif not error.reason and not isinstance(error, InvalidRequest):
        # The transport's own words are about addresses that are nobody's business.
        message = "the service does not answer" if error.is_retryable else "internal error"
    waiting_helps = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    headers = {"retry-after": str(max(1, round(error.retry_after or 1)))} if waiting_helps else {}
    return _answer(status, code, message, details, headers)


def internal_answer(request_id: str) -> Response:
    """Return the answer to a request that met a fault of ours."""
    message = f"internal error; the gateway's log says more about {request_id}"
    return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", message, [], {})


def stopping_answer(*, writes: bool) -> Response:
    """Return the answer to a request that was not done when the gateway's time to stop was over."""
    status, headers = HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "1"}
    if writes:
        return _answer(status, "COMMIT_OUTCOME_UNKNOWN", _OUTCOME_UNKNOWN, [], headers)
    return _answer(status, "SHUTTING_DOWN", "the gateway is stopping", [], headers)


def http_name(field: str) -> str:
    """Return the name that HTTP has for the path of a protobuf field."""
    path = _EVENT_PATH.sub("", field)
    head, dot, last = path.rpartition(".")
    return head + dot + _NAMES.get(last, _camel(last))


def http_text(text: str) -> str:
    """Return a sentence in which fields have the names that HTTP has for them."""
    return _SNAKE.sub(lambda found: _camel(found[0]), text)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _summary(details: list[Detail]) -> str:
    others = len(details) - 1
    more = f" (and {others if others < _MOST_DETAILS else f'at least {others}'} more)" if others else ""
    return f"{details[0].field}: {details[0].message}{more}"


def _answer(status: HTTPStatus, code: str, message: str, details: list[Detail], headers: Mapping[str, str]) -> Response:
    body = ErrorAnswer(code.replace("_", " ").lower(), message, code, details[:_MOST_DETAILS])
    return Response(msgspec.json.encode(body), status, dict(headers), "application/json")
