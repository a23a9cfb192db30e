"""The services of grpc's own packages, health and reflection, served such that what they receive is bounded, too."""

import inspect
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from collab_service.rpc.reads import Context, Reads, Requests


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
    decode = GetMessageClass(method.input_type).FromString

    async def call(_: object, context: Context) -> Any:
        async def end() -> None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the request was long in coming")

        requests = Requests(reads, context, decode, end)
        try:
            if inspect.isasyncgenfunction(behaviour):
                async for answer in behaviour(requests, context):
                    await context.write(answer)
                return None
            async for request in requests:
                return await behaviour(request, context)
        except DecodeError:
            pass
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request must be this call's message")

    encode = GetMessageClass(method.output_type).SerializeToString
    if method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(call, response_serializer=encode)
    return grpc.stream_unary_rpc_method_handler(call, response_serializer=encode)
