"""The boundary between gRPC and the servicer: what comes in is decoded, what goes wrong is answered and logged.

Requests are decoded here and not by grpc, which would answer `INTERNAL` to bytes that are no message. Nothing leaves
but our own errors: the text of an unexpected exception stays in the log.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from collab_service.metrics import RpcMetrics
from collab_service.model.errors import CollabError, InvalidArgument, ShuttingDown, Violation
from collab_service.rpc.status import DETAILS_KEY, Failure, failure_of, internal_failure
from collab_service.storage.driver_errors import cause_of

_log = structlog.get_logger(__name__)

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller's own request id may look like; any other is replaced."""

Context = grpc.aio.ServicerContext[Any, Any]


class Boundary:
    """Wraps the servicer's methods into handlers for grpc, and counts the calls in progress."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics
        metrics.watch(lambda: self._calls)
        self._calls = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(
        self, method: MethodDescriptor, behaviour: Callable[[Any, Context], Awaitable[Any]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the handler for one RPC, carried out by `behaviour`."""
        decode = GetMessageClass(method.input_type).FromString
        read = partial(_decoded_stream if method.client_streaming else _decoded, decode)
        name = method.name
        metrics = self._metrics.of(name)

        async def fail(context: Context, error: Exception) -> None:
            request_id = _request_id(context)
            failure = _failure(name, request_id, error)
            metrics.failed(failure.code.name, failure.reason)
            trailing = ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, failure.details))
            await context.abort(failure.code, failure.message, trailing)

        async def call(request: Any, context: Context) -> Any:
            try:
                if self._draining:
                    return await fail(context, ShuttingDown())
                self._calls += 1
                self._idle.clear()
                try:
                    answer = await behaviour(read(request), context)
                    metrics.answered()
                    return answer
                except (asyncio.CancelledError, grpc.aio.InternalError):
                    raise
                except Exception as error:
                    failure = error
                finally:
                    self._calls -= 1
                    if not self._calls:
                        self._idle.set()
                # No longer counted: a client that takes no message takes no status either.
                await fail(context, failure)
            except (asyncio.CancelledError, grpc.aio.InternalError) as error:
                # The latter is what sending says when the client is gone, just before grpc cancels the call.
                metrics.failed("CANCELLED")
                _log.info("call was cancelled", method=name, request_id=_request_id(context))
                raise asyncio.CancelledError from error

        encode = GetMessageClass(method.output_type).SerializeToString
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=encode)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(call)  # it writes bytes
        return grpc.unary_unary_rpc_method_handler(call, response_serializer=encode)

    async def drain(self) -> None:
        """Refuse calls from now on, and wait until those in progress have finished."""
        self._draining = True
        await self._idle.wait()


def _decoded(decode: Callable[[bytes], Message], data: bytes) -> Message:
    try:
        return decode(data)
    except DecodeError as error:
        what = "must be the bytes of this call's request message, with valid UTF-8 in text fields"
        raise InvalidArgument([Violation("request", what)]) from error


async def _decoded_stream(
    decode: Callable[[bytes], Message], messages: AsyncIterator[bytes]
) -> AsyncGenerator[Message, None]:
    async for data in messages:
        yield _decoded(decode, data)


def _failure(method: str, request_id: str, error: Exception) -> Failure:
    """Log what has gone wrong, and return what to answer."""
    log = _log.bind(method=method, request_id=request_id)
    if isinstance(error, CollabError):
        failure = failure_of(error)
        log.info("call failed", code=failure.code.name, reason=failure.reason, cause=cause_of(error))
    else:
        failure = internal_failure(request_id)
        log.error("call failed", code=failure.code.name, reason=failure.reason, exc_info=error)
    return failure


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
