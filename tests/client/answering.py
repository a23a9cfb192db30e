"""A service that gives the answers it is told to, where a real one cannot be brought to give them."""

import asyncio
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from collab_service.rpc.boundary import REQUEST_ID_KEY
from collab_service.rpc.reads import Context
from collab_service.rpc.server import SERVICE
from collab_service.rpc.status import DETAILS_KEY, DOMAIN

REQUEST_ID = "the-request"


class Refusal:
    """A status to answer with; with a reason it has details as the service's own errors have."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str = "",
        message: str = "no",
        *,
        retry_after: float | None = None,
        side_effects: str = "none",
        **metadata: str,
    ) -> None:
        self.code = code
        self.message = message
        self.trailing: tuple[tuple[str, str | bytes], ...] = ()
        if not reason:
            return
        details: list[Message] = [
            ErrorInfo(reason=reason, domain=DOMAIN, metadata={**metadata, "side_effects": side_effects})
        ]
        if retry_after is not None:
            delay = Duration()
            delay.FromMicroseconds(int(retry_after * 1_000_000))
            details.append(RetryInfo(retry_delay=delay))
        status = Status(code=code.value[0], message=message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        self.trailing = ((REQUEST_ID_KEY, REQUEST_ID), (DETAILS_KEY, status.SerializeToString()))


class AnsweringService:
    """Answers calls, whatever they ask for, with what was given, one after the other; the last one for ever.

    A stream takes messages until there comes a refusal, or none.
    """

    def __init__(self, *answers: Refusal | Message) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []
        """What they asked for."""
        self.times: list[float] = []
        """When calls came, by the loop's clock."""

    @property
    def calls(self) -> int:
        """How many calls came."""
        return len(self.times)

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            method.name: grpc.unary_stream_rpc_method_handler(self._stream)
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler(self._answer)
            for method in SERVICE.methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def _answer(self, request: bytes, context: Context) -> bytes:
        self._count(request)
        return await self._next(context)

    async def _stream(self, request: bytes, context: Context) -> None:
        self._count(request)
        await context.write(await self._next(context))
        while len(self._answers) > 1:
            await context.write(await self._next(context))

    def _count(self, request: bytes) -> None:
        self.requests.append(request)
        self.times.append(asyncio.get_running_loop().time())

    async def _next(self, context: Context) -> bytes:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Refusal):
            await context.abort(answer.code, answer.message, answer.trailing)
        return answer.SerializeToString()
