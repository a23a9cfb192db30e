"""HTTP on the wire: uvicorn's protocol, with a bound on heads, and errors in the contract's shape."""

import uuid
from http import HTTPStatus

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from collab_service.gateway.errors import RequestError, answer_to_error

_log = structlog.get_logger(__name__)

_MOST_HEAD_BYTES = 64 * 1024
"""What may come without a request, or a part of its body, being complete. The parser itself would keep any amount."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _unfinished = 0

    @property
    def is_answering(self) -> bool:
        """Whether an answer has begun and is not complete."""
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Take what a client sends."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > _MOST_HEAD_BYTES:
            what = f"the first line and the headers must be at most {_MOST_HEAD_BYTES} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "HEADERS_TOO_LARGE", what)

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a request's body."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take note of the end of a request."""
        self._unfinished = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "INVALID_REQUEST", "this is not a request of HTTP/1.1 (RFC 9112)")

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.is_answering or self.pipeline:
            self.transport.abort()  # this would come in the middle of another answer
            return
        request_id = uuid.uuid4().hex
        _log.info("request failed", status=int(status), code=code, request_id=request_id)
        answer = answer_to_error(RequestError(status, code, message))
        headers = [*answer.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + answer.body)
        self.transport.close()
