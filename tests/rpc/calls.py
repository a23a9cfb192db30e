"""Calling the service in the tests, and reading its errors."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

TIMEOUT = 30.0


class Failure:
    """A failed call, taken apart."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        trailing: Any = error.trailing_metadata()
        self.trailing: dict[str, Any] = dict(trailing or ())
        self.status = Status.FromString(self.trailing["grpc-status-details-bin"])
        assert self.status.code == self.code.value[0]
        assert self.status.message == self.message
        (info,) = self._details(ErrorInfo)
        self.reason: str = info.reason
        self.metadata: dict[str, str] = dict(info.metadata)
        assert info.domain == "collab_service"
        assert self.trailing["x-request-id"]

    def _details(self, kind: type[Any]) -> list[Any]:
        found = []
        for detail in self.status.details:
            message = kind()
            if detail.Unpack(message):
                found.append(message)
        return found

    @property
    def violations(self) -> dict[str, str]:
        """The bad fields, with what was said about each."""
        (bad,) = self._details(BadRequest)
        return {violation.field: violation.description for violation in bad.field_violations}

    @property
    def retry_seconds(self) -> float:
        """How long to wait."""
        (info,) = self._details(RetryInfo)
        return float(info.retry_delay.ToMilliseconds() / 1000)


def failure(call: Callable[[], object]) -> Failure:
    """Make a call that has to fail with one of our errors."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return Failure(caught.value)


def new_session(stub: CollabServiceStub, **fields: Any) -> int:
    """Create a session and return its id."""
    return stub.CreateSession(pb.CreateSessionRequest(**fields), timeout=TIMEOUT).session.id


def append(
    stub: CollabServiceStub, session_id: int, expected: int | None = None, **event: Any
) -> pb.AppendEventResponse:
    """Append one event."""
    request = pb.AppendEventRequest(
        session_id=session_id, event=pb.NewEvent(**event), expected_last_server_seq=expected
    )
    return stub.AppendEvent(request, timeout=TIMEOUT)


def read(stub: CollabServiceStub, session_id: int, **fields: Any) -> list[pb.ListEventsResponse]:
    """Return all messages of a list."""
    return list(stub.ListEvents(pb.ListEventsRequest(session_id=session_id, **fields), timeout=TIMEOUT))


def events(stub: CollabServiceStub, session_id: int, **fields: Any) -> list[pb.Event]:
    """Return all events of a list."""
    return [event for message in read(stub, session_id, **fields) for event in message.events]


def message_of(kind: type[Any], fields: dict[str, Any]) -> Any:
    """Return a message from a dictionary."""
    return ParseDict(fields, kind())


def raw_call(channel: grpc.Channel, method: str, data: bytes) -> grpc.RpcError | None:
    """Send bytes as the request of a method; return the error."""
    path = f"/collab_service.v1.CollabService/{method}"
    try:
        if method == "ListEvents":
            list(channel.unary_stream(path, bytes, bytes)(data, timeout=TIMEOUT))
        else:
            channel.unary_unary(path, bytes, bytes)(data, timeout=TIMEOUT)
    except grpc.RpcError as error:
        return error
    return None
