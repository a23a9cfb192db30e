"""The boundary between gRPC and the servicer: what comes in is decoded, what goes wrong is answered and logged.

Requests are decoded here and not by grpc, which would answer `INTERNAL` to bytes that are no message. Nothing leaves
but our own errors: the text of an unexpected exception stays in the log.
"""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from collab_service.logs import LineBudget
from collab_service.metrics import RpcMetrics
from collab_service.model.errors import CollabError, InvalidArgument, Overloaded, ShuttingDown, Violation
from collab_service.rpc.admission import Admission, Kind
from collab_service.rpc.answers import Answers
from collab_service.rpc.reads import Context, Reads, Requests
from collab_service.rpc.status import DETAILS_KEY, Failure, failure_of, internal_failure
from collab_service.storage.driver_errors import cause_of

_log = structlog.get_logger(__name__)

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller's own request id may look like; any other is replaced."""

_HELD_BYTES = 128 * 1024 * 1024
"""Bytes of requests that calls in progress may hold: what may wait to be written, and as much as is being written at
most."""
_RECEIVED_BYTES = 64 * 1024 * 1024
"""Bytes of requests that may be received at once, as far as can be told before they have come."""

_NO_MORE = 0.05
"""Seconds without a call, after which no more are expected while refusals are held back."""
_REFUSED_LINES, _CANCELLED_LINES, _FAILED_LINES = 1, 20, 100
"""Lines of the log in a second, at most, that tell of calls refused as too many, of calls that were given up, and of
those that have failed otherwise: under a flood they come by the thousand. A fault of our own always has its line, which
its caller was told of."""


class _CallsInProgress:
    """Calls are in progress within its context, from when their request has come."""

    def __init__(self) -> None:
        self.count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        if self._draining:
            raise ShuttingDown
        self.count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def drain(self) -> None:
        """Let no more in, and wait until all have left."""
        self._draining = True
        await self._idle.wait()


class Boundary:
    """Wraps the servicer's methods into handlers for grpc, and counts the calls in progress."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics
        self._admission = Admission(held=_HELD_BYTES, received=_RECEIVED_BYTES)
        self._reads_of_streams = Reads()
        self._answers = Answers()
        self.bounded = self._admission.reads, self._reads_of_streams, self._answers
        """What is to be ended where the memory is full."""
        self._calls = _CallsInProgress()
        self._held_back = 0
        self._may_refuse = asyncio.Event()
        self._may_refuse.set()
        metrics.watch(lambda: self._calls.count)
        self._refused_lines = LineBudget(_REFUSED_LINES)
        self._cancelled_lines = LineBudget(_CANCELLED_LINES)
        self._failed_lines = LineBudget(_FAILED_LINES)

    def handlers(
        self, service: ServiceDescriptor, servicer: object, *, looks: Mapping[str, Callable[[bytes], None]]
    ) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        """Return the handlers of a service's methods, by their names.

        Args:
            service: The service.
            servicer: Has its methods.
            looks: By the name of the method, what is called with a request before it is decoded; may raise our errors.
        """
        return {
            method.name: self._handler(method, getattr(servicer, method.name), looks.get(method.name))
            for method in service.methods
        }

    def _handler(
        self,
        method: MethodDescriptor,
        behaviour: Callable[[Any, Context], Awaitable[Any]],
        look_at: Callable[[bytes], None] | None,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the handler for one RPC, carried out by `behaviour`."""
        decode = GetMessageClass(method.input_type).FromString
        encode = GetMessageClass(method.output_type).SerializeToString
        name = method.name
        metrics = self._metrics.of(name)
        kind = Kind()

        async def fail(context: Context, error: Exception) -> None:
            request_id = _request_id(context)
            failure = self._failure(name, request_id, error)
            metrics.failed(failure.code.name, failure.reason)
            _forget_frames(error)
            trailing = ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, failure.details))
            await context.abort(failure.code, failure.message, trailing)

        async def carry_out(context: Context) -> Any:
            def end() -> Coroutine[Any, Any, None]:
                return fail(context, Overloaded("the request was long in coming"))

            if method.client_streaming:
                requests = Requests(self._reads_of_streams, context, partial(_decoded, decode), end)
                with self._calls:
                    return await behaviour(requests, context)
            data = await self._admission.receive(context, kind, end)
            size = len(data)
            try:
                with self._calls:
                    if look_at is not None:
                        look_at(data)
                    answer = behaviour(_decoded(decode, data), context)
                    del data  # what waits is held once
                    if method.server_streaming:  # which goes on for long, and keeps nothing of it
                        self._admission.release(size)
                        size = 0
                    return await answer
            finally:
                self._admission.release(size)

        async def call(_: object, context: Context) -> Any:
            try:
                answer = await carry_out(context)
                metrics.answered()
                if method.server_streaming:
                    return None
                encoded = encode(answer)
                self._answers.sends(context, len(encoded))
                return encoded
            except grpc.aio.AbortError:
                raise  # it has failed already
            except (asyncio.CancelledError, grpc.aio.InternalError) as error:
                # The latter is what sending says when the client is gone, just before grpc cancels the call.
                metrics.failed("CANCELLED")
                if calls := self._cancelled_lines.take():
                    _log.info("call was cancelled", method=name, request_id=_request_id(context), calls=calls)
                raise asyncio.CancelledError from error
            except Exception as error:
                failure = error
            # No longer in progress: a client that takes no message takes no status either.
            try:
                if isinstance(failure, ShuttingDown):
                    self._held_back += 1
                    await self._may_refuse.wait()
                await fail(context, failure)
            except grpc.aio.InternalError as error:
                raise asyncio.CancelledError from error

        # To grpc all calls bring streams of requests: what they bring is read here, or not at all.
        if not method.server_streaming:
            return grpc.stream_unary_rpc_method_handler(call)
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=encode)
        return grpc.stream_stream_rpc_method_handler(call)  # it writes bytes

    async def drain(self) -> None:
        """Refuse calls from now on, and wait until those in progress have finished."""
        await self._calls.drain()

    async def hold_refusals_back(self) -> None:
        """Refuse nobody until `let_refusals_go`; return once no calls come, since those who wait make no new ones."""
        self._may_refuse.clear()
        before = -1
        while before < self._held_back:
            before = self._held_back
            await asyncio.sleep(_NO_MORE)

    def let_refusals_go(self) -> None:
        """Refuse those that have been held back."""
        self._may_refuse.set()

    def _failure(self, method: str, request_id: str, error: Exception) -> Failure:
        """Log what has gone wrong, and return what to answer."""
        log = _log.bind(method=method, request_id=request_id)
        if not isinstance(error, CollabError):
            failure = internal_failure(request_id)
            log.error("call failed", code=failure.code.name, reason=failure.reason, exc_info=error)
            return failure
        failure = failure_of(error)
        lines = self._refused_lines if isinstance(error, Overloaded) else self._failed_lines
        if calls := lines.take():
            cause = cause_of(error)
            log.info("call failed", code=failure.code.name, reason=failure.reason, cause=cause, calls=calls)
        return failure


def _decoded(decode: Callable[[bytes], Message], data: bytes) -> Message:
    try:
        return decode(data)
    except DecodeError as error:
        what = "must be the bytes of this call's request message, with valid UTF-8 in text fields"
        raise InvalidArgument([Violation("request", what)]) from error


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what an error has gone through, and with it of the request.

    What `abort` raises is held by the call that it holds, until the garbage collector finds both.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
