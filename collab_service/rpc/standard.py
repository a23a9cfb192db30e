"""The services of grpc's own packages, health and reflection, served such that they are bounded as all else is."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from collab_service.rpc.reads import Context, Reads, Requests
from collab_service.rpc.sockets import close_connections

_LARGEST_REQUEST = 4_096
"""Bytes. What is asked for are names."""
_STALLED = 60.0
"""Seconds after which a client that takes no answer is cut off."""


class _BadRequest(Exception):
    """The bytes are no request."""


def standard_handlers(
    service: ServiceDescriptor, servicer: object, reads: Reads
) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
    """Return handlers for the methods that a grpc.aio servicer has, by their names.

    Args:
        service: The service.
        servicer: What carries it out.
        reads: Where it is seen what is being received.
    """
    return {
        method.name: _handler(method, getattr(servicer, method.name), reads)
        for method in service.methods
        if method.name in vars(type(servicer))
    }


def _handler(method: MethodDescriptor, behaviour: Any, reads: Reads) -> "grpc.RpcMethodHandler[Any, Any]":
    decode = _small(GetMessageClass(method.input_type).FromString)

    async def carry_out(requests: Requests[Message], context: Context) -> Any:
        if not inspect.isasyncgenfunction(behaviour):
            async for request in requests:
                return await behaviour(request, context)
            raise _BadRequest
        async for answer in behaviour(requests, context):
            try:
                async with asyncio.timeout(_STALLED):
                    await context.write(answer)
            except TimeoutError:
                close_connections([context.peer()])
        return None

    async def call(_: object, context: Context) -> Any:
        async def end() -> None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the request was long in coming")

        try:
            return await carry_out(Requests(reads, context, decode, end), context)
        except _BadRequest:
            what = f"the request must be this call's message, of at most {_LARGEST_REQUEST} bytes"
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, what)

    encode = GetMessageClass(method.output_type).SerializeToString
    if method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(call, response_serializer=encode)
    return grpc.stream_unary_rpc_method_handler(call, response_serializer=encode)


def _small(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message]:
    def decode_small(data: bytes) -> Message:
        if len(data) > _LARGEST_REQUEST:
            raise _BadRequest
        try:
            return decode(data)
        except DecodeError as error:
            raise _BadRequest from error

    return decode_small
