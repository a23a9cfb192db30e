"""Wrong frames, floods, garbage for messages and too many connections: others are served, and nothing is stored."""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.wire import connected
from tests.hostile.conftest import CONNECTIONS, last_words, stored
from tests.http2 import EMPTY_SETTINGS, PREFACE, FollowConnection, frame
from tests.memory import resident_kilobytes
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure, append, events, new_session, raw_call
from tests.rpc.test_fuzz import EXPECTED

_METHODS = pb.DESCRIPTOR.services_by_name["CollabService"].methods
_HELLO = PREFACE + EMPTY_SETTINGS
_PATIENCE = 15.0

_WRONG = {
    "no HTTP/2": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "noise": random.Random(1).randbytes(500),
    "no settings": PREFACE + frame(0, 0, 1, b"x"),
    "data of no stream": _HELLO + frame(0, 1, 1, b"x" * 100),
    "data of stream 0": _HELLO + frame(0, 0, 0, b"x"),
    "a frame too long": _HELLO + b"\xff\xff\xff\0\0\0\0\0\1" + b"x" * 100_000,
    "headers that are none": _HELLO + frame(1, 5, 1, b"\xff" * 50),
    "a stream of even number": _HELLO + frame(1, 5, 2, b"\x82"),
    "a continuation of nothing": _HELLO + frame(9, 4, 1, b"\x82"),
    "settings of a wrong length": _HELLO + frame(4, 0, 0, b"12345"),
    "a window that overflows": _HELLO + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "a ping of a wrong length": _HELLO + frame(6, 0, 0, b"1"),
}
_FLOODS = {
    "pings": frame(6, 0, 0, b"12345678"),
    "settings": frame(4, 0, 0),
    "empty data": frame(0, 0, 1),
    "window updates": frame(8, 0, 0, b"\0\0\0\1"),
    "resets": frame(3, 0, 1, b"\0\0\0\x08"),
    "continuations": frame(9, 0, 1, b"\0\1x\1y"),
}


@pytest.fixture(scope="module")
def channel(attacked: ServeProcess) -> Iterator[grpc.Channel]:
    """A channel that was there before the attacks, and works through all of them."""
    with grpc.insecure_channel(attacked.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> CollabServiceStub:
    """A client that behaves well."""
    return CollabServiceStub(channel)


@pytest.mark.parametrize("method", [method.name for method in _METHODS])
def test_garbage_for_messages(
    attacked_database_url: str, channel: grpc.Channel, stub: CollabServiceStub, method: str
) -> None:
    """Whatever comes is answered, or refused with an error of the contract that leaves nothing stored."""
    noise = random.Random(method)
    session_id = new_session(stub)
    valid = pb.AppendEventsRequest(session_id=session_id, events=[pb.NewEvent(json="{}", actor_id="a")])
    before = stored(attacked_database_url)
    refused = 0
    for number in range(60):
        sent = bytearray(noise.randbytes(noise.randrange(1, 80)) if number % 2 else valid.SerializeToString())
        sent[noise.randrange(len(sent))] = noise.randrange(256)
        data = bytes(sent)
        error = _stream_call(channel, data) if method == "AppendStream" else raw_call(channel, method, data)
        if error is None:
            before = stored(attacked_database_url)
        else:
            refused += 1
            assert Failure(error).reason in EXPECTED
            now = stored(attacked_database_url)  # less than before where a deleted session is removed
            assert (now[0] <= before[0], now[1] <= before[1]) == (True, True)
    assert refused > 10


def _stream_call(channel: grpc.Channel, data: bytes) -> grpc.RpcError | None:
    call = channel.stream_stream("/collab_service.v1.CollabService/AppendStream", bytes, bytes)
    try:
        list(call(iter([data]), timeout=TIMEOUT))
    except grpc.RpcError as error:
        return error
    return None


@pytest.mark.parametrize("sent", _WRONG.values(), ids=_WRONG)
async def test_wrong_frames(attacked: ServeProcess, stub: CollabServiceStub, sent: bytes) -> None:
    """The connection, or the stream, ends; other connections do not notice."""
    async with connected(attacked.grpc_address) as connection:
        await last_words(connection, sent)
    append(stub, new_session(stub))


@pytest.mark.parametrize("flood", _FLOODS.values(), ids=_FLOODS)
async def test_floods(attacked: ServeProcess, stub: CollabServiceStub, flood: bytes) -> None:
    """A flood of small frames from a client that reads no answer costs no memory, and others are served meanwhile."""
    session_id = new_session(stub)
    before = resident_kilobytes(attacked.process.pid)
    async with connected(attacked.grpc_address, small=True) as connection:
        connection.writer.write(_HELLO + frame(1, 0 if flood[3] == 9 else 4, 1, b"\x83\x86"))
        try:
            async with asyncio.timeout(2):
                for _ in range(200):
                    connection.writer.write(flood * 1_000)
                    await connection.writer.drain()
        except (TimeoutError, ConnectionError):
            pass
        await asyncio.to_thread(append, stub, session_id)
        assert resident_kilobytes(attacked.process.pid) - before < 30_000


async def test_calls_that_are_given_up_at_once(attacked: ServeProcess, stub: CollabServiceStub) -> None:
    """A client that opens calls and resets them as fast as it can holds nobody up, and costs so much and no more."""
    session_id = new_session(stub)
    append(stub, session_id)
    connection = await FollowConnection.open(attacked.grpc_address, lambda *_: None)

    async def attack(rounds: int) -> int:
        """Return by how many kilobytes the server grows while appends are answered between calls by the hundred."""
        before = resident_kilobytes(attacked.process.pid)
        async with asyncio.timeout(_PATIENCE):
            for _ in range(rounds):
                for _ in range(500):
                    connection.reset(connection.follow(pb.ListEventsRequest(session_id=session_id, follow=True)))
                await asyncio.to_thread(append, stub, session_id)
                assert not connection.closed.done()
        return resident_kilobytes(attacked.process.pid) - before

    assert await attack(50) < 150_000
    assert await attack(150) < 60_000
    connection.transport.abort()
    assert [event.server_seq for event in events(stub, session_id)] == list(range(1, 202))


@pytest.mark.long
async def test_a_connection_that_says_nothing(attacked: ServeProcess) -> None:
    """It has 10 s to become one of HTTP/2."""
    async with connected(attacked.grpc_address) as silent, connected(attacked.grpc_address) as half:
        half.writer.write(_HELLO[:10])
        async with asyncio.timeout(_PATIENCE):
            while await silent.reader.read(65_536):
                pass
            while await half.reader.read(65_536):
                pass


async def test_too_many_connections(attacked: ServeProcess, stub: CollabServiceStub) -> None:
    """Further ones are closed at once; those that are there go on, and a new one is taken when another has left."""
    session_id = new_session(stub)
    async with AsyncExitStack() as stack:
        many = [await stack.enter_async_context(connected(attacked.grpc_address)) for _ in range(2 * CONNECTIONS)]
        for connection in many:
            connection.writer.write(_HELLO)
        async with asyncio.timeout(_PATIENCE):
            refused = 0
            for connection in many:
                try:
                    refused += await connection.reader.read(1) == b""
                except ConnectionError:
                    refused += 1
        assert refused >= CONNECTIONS
        append(stub, session_id)
    append(stub, session_id)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")
async def test_stalled_readers_of_large_events(attacked: ServeProcess, stub: CollabServiceStub) -> None:
    """Hundreds who take nothing cost no more than a budget, however large the events; others append and read."""
    session_id = new_session(stub)
    for _ in range(3):
        append(stub, session_id, binary=b"x" * 1_000_000)
    before = resident_kilobytes(attacked.process.pid)
    connections = []
    for number in range(10):
        connection = await FollowConnection.open(attacked.grpc_address, lambda *_: None, window=100)
        connections.append(connection)
        for _ in range(40):
            connection.follow(pb.ListEventsRequest(session_id=session_id, follow=number % 2 == 0))
    attacked_for = asyncio.get_running_loop().time() + 5
    while asyncio.get_running_loop().time() < attacked_for:
        await asyncio.to_thread(append, stub, session_id)
        assert resident_kilobytes(attacked.process.pid) - before < 400 * 1024
        await asyncio.sleep(0.1)
    request = pb.ListEventsRequest(session_id=session_id, limit=3)
    read = await asyncio.to_thread(lambda: list(stub.ListEvents(request, timeout=TIMEOUT)))
    assert sum(len(message.events) for message in read) == 3
    assert any(line["event"].startswith("a client takes nothing") for line in attacked.lines)
    for connection in connections:
        connection.transport.abort()
