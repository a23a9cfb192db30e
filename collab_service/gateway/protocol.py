"""HTTP on the wire: uvicorn's protocol, with bounds on what connections cost, and errors in the contract's shape."""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from collab_service.gateway.errors import RequestError, answer_to_error

_log = structlog.get_logger(__name__)

_MOST_HEAD_BYTES = 64 * 1024
"""What a first line and headers may have, also when they come in pieces, and what may come between two parts of a body.
The parser itself would keep any amount."""


_HEADER_BYTES = 4
"""What a header has besides its name and its value."""
_HEAD_SECONDS = 10.0
"""For a first line and headers to come, from the first byte on, and for a new connection to say anything."""
_BODY_SECONDS = 60.0
"""For a body to come."""
_STALLED_SECONDS = 60.0
"""After which a client that takes nothing of its answer is cut off."""
_STALLED_BYTES = 32 * 1024 * 1024
"""Of answers that wait to be taken, from which on clients that take little are cut off."""
_LITTLE = 64 * 1024
"""Bytes between two looks."""
_LOOK = 1.0
"""Seconds between looks at a client that does not take all that there is for it."""


@dataclass(slots=True)
class Connections:
    """What the connections of a process may cost together."""

    most: int
    """How many there may be."""
    turns: asyncio.Semaphore
    """How many pages of events may be on their way at once."""
    waiting: set["Protocol"] = field(default_factory=set)
    """Those that wait for their clients to take what there is for them."""

    def are_crowded(self) -> bool:
        """Whether so much waits to be taken that others have to wait."""
        return self.turns.locked() or sum(map(_bytes_to_take, self.waiting)) > _STALLED_BYTES


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, together: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._together = together
        self._unfinished = 0
        self._head_bytes = 0
        self.url = b""
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._to_take = 0
        self._taken_at = 0.0
        self._last_used = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where there are too many, the one that has been idle for longest makes room."""
        super().connection_made(transport)
        if len(self.connections) <= self._together.most:
            self._wait(_HEAD_SECONDS)
            return
        others = (other for other in self.connections if isinstance(other, Protocol) and other is not self)
        idle = min((other for other in others if other.is_idle), key=lambda other: other._last_used, default=None)
        if idle is None:
            what = "there are too many connections"
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "OVERLOADED", what, {"retry-after": "1"})
        else:
            idle.transport.abort()
            self.connections.discard(idle)
            self._wait(_HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a connection."""
        self._forget_timer()
        self.resume_writing()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being carried out."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_answering(self) -> bool:
        """Whether an answer has begun and is not complete."""
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Take what a client sends."""
        self._unfinished += len(data)
        self._last_used = self.loop.time()
        super().data_received(data)
        if self._unfinished > _MOST_HEAD_BYTES:
            self._refuse_head()
        elif self._in_body or self._unfinished:
            if self._timer is None:
                self._wait(_BODY_SECONDS if self._in_body else _HEAD_SECONDS)
        else:
            self._forget_timer()

    def on_message_begin(self) -> None:
        """Begin to take a request."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What is raised here ends the parsing, and comes out as `send_400_response`."""
        self._head_bytes += len(name) + len(value) + _HEADER_BYTES
        if self._head_bytes + len(self.url) > _MOST_HEAD_BYTES:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        self._unfinished = 0
        self._in_body = True
        self._forget_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a request's body."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take note of the end of a request."""
        self._unfinished = 0
        self._in_body = False
        self._forget_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Take note that the client does not take all that there is for it."""
        super().pause_writing()
        self._together.waiting.add(self)
        self._to_take, self._taken_at = _bytes_to_take(self), self.loop.time()
        self._look = self.loop.call_later(_LOOK, self._look_at_client)

    def resume_writing(self) -> None:
        """Take note that the client has taken most of it."""
        super().resume_writing()
        self._together.waiting.discard(self)
        if self._look is not None:
            self._look.cancel()

    def _look_at_client(self) -> None:
        now, before = self.loop.time(), self._to_take
        self._to_take = _bytes_to_take(self)
        taken = before - self._to_take
        if taken > 0:
            self._taken_at = now
        stalled = now - self._taken_at
        if stalled >= _STALLED_SECONDS or (taken < _LITTLE and self._together.are_crowded()):
            _log.info("client takes nothing, cut off", stalled_seconds=round(stalled, 1))
            self.transport.abort()
        else:
            self._look = self.loop.call_later(_LOOK, self._look_at_client)

    def _wait(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._late, seconds)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self, seconds: float) -> None:
        if self.flow.read_paused:  # it is us who take nothing
            self._wait(seconds)
        elif not self._in_body and not self._unfinished:
            self.transport.close()
        elif self._in_body and self.is_idle:
            self.transport.abort()  # it has had its answer; what did not come is the rest of a body
        else:
            what = f"the request did not come within {seconds:.0f} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "REQUEST_TIMEOUT", what)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        if self._head_bytes + len(self.url) > _MOST_HEAD_BYTES:
            self._refuse_head()
            return
        self._refuse(HTTPStatus.BAD_REQUEST, "INVALID_REQUEST", "this is not a request of HTTP/1.1 (RFC 9112)")

    def _refuse_head(self) -> None:
        what = f"the first line and the headers must be at most {_MOST_HEAD_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "HEADERS_TOO_LARGE", what)

    def _refuse(self, status: HTTPStatus, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        if self.transport.is_closing():
            return
        if self.is_answering or self.pipeline:
            self.transport.abort()  # this would come in the middle of another answer
            return
        request_id = uuid.uuid4().hex
        _log.info("request failed", status=int(status), code=code, request_id=request_id)
        answer = answer_to_error(RequestError(status, code, message, headers=headers))
        lines = [*answer.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % line for line in lines)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + answer.body)
        self.transport.close()


def _bytes_to_take(connection: Protocol) -> int:
    return connection.transport.get_write_buffer_size()
