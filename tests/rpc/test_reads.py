"""Requests that are long in coming: how their calls end, and what is left of them."""

import asyncio
import time

import grpc
import pytest

from collab_service import memory
from collab_service.model.errors import Overloaded
from collab_service.rpc.admission import Admission, Kind
from collab_service.rpc.reads import Context, Reads
from tests.http2 import UnfinishedRequests
from tests.memory import used_bytes
from tests.waiting import until

_SIZE = 1_000_000


@pytest.mark.skipif(not memory.tells_resident_bytes(), reason="the system does not tell")
async def test_a_request_that_is_whole_just_as_its_call_is_ended() -> None:
    """Its call ends as it should, and nothing of it stays in the memory."""
    reads = Reads()

    async def call(_: object, context: Context) -> bytes | None:
        async def end() -> None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow")

        return await reads.read(context, end)

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"call": grpc.stream_unary_rpc_method_handler(call)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()

    async def end_one() -> None:
        connection = await UnfinishedRequests.open(address)
        connection.begin("/test/call", bytes(_SIZE))

        async def is_nearly_whole() -> bool:
            connection.send_more(_SIZE)
            return not connection.unsent and len(reads) == 1

        await until(is_nearly_whole, "all but the last byte")
        connection.finish()
        time.sleep(0.05)  # noqa: ASYNC251 - grpc's own threads take it, while nothing here goes on
        assert reads.end_longest(asyncio.get_running_loop().time())

        async def is_ended() -> bool:
            return connection.ended_streams > 0

        await until(is_ended, "the end of the call")
        connection.transport.abort()

    await end_one()
    before = used_bytes()
    for _ in range(12):
        await end_one()
    assert len(reads) == 0
    assert used_bytes() - before < 6 * _SIZE
    await server.stop(0)


async def test_what_requests_are_expected_to_have() -> None:
    """Room is reckoned by what requests of the method were like of late: after large appends, follows are let in."""
    admission = Admission(held=100 * _SIZE, received=8 * _SIZE)

    def handler(kind: Kind) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def call(_: object, context: Context) -> bytes:
            async def end() -> None:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow")

            try:
                admission.release(len(await admission.receive(context, kind, end)))
            except Overloaded:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
            return b""

        return grpc.stream_unary_rpc_method_handler(call)

    server = grpc.aio.server()
    handlers = {"large": handler(Kind()), "small": handler(Kind())}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        large: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/large")
        for _ in range(100):
            await large(bytes(_SIZE))
    connection = await UnfinishedRequests.open(address)
    try:
        for _ in range(50):
            connection.begin("/test/small", bytes(10))

        async def are_received() -> bool:
            return len(admission.reads) == 50

        await until(are_received, "all small ones")
        for _ in range(50):
            connection.begin("/test/large", bytes(10))

        async def are_refused() -> bool:
            return connection.unfinished == 58

        await until(are_refused, "the end of all large ones but for eight")
        assert len(admission.reads) == 58
    finally:
        connection.transport.abort()
        await server.stop(0)
