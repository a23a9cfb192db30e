"""Figures of live follows: how soon events arrive, and what followers cost while nothing does.

The followers are a process of their own, which takes messages at little cost (see `tests.http2`); every event carries
the time of its `AppendEvent` call as its `client_seq`.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import grpc
import uvloop

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.bench.load import PAYLOAD, append_rate
from tests.http2 import FollowConnection
from tests.memory import resident_kilobytes

_WARM_UP = 200
"""Events that are not counted."""
_CONNECTIONS = 4
_PATIENCE = 60.0
_ECHO = "/collab_service.v1.CollabService/AppendEvent"


class Delays(NamedTuple):
    """Milliseconds."""

    p50: float
    p99: float


def delivery(writer: str, follower: str, session: int, *, followers: int, rate: int, seconds: int) -> Delays:
    """Return the delay from the call of `AppendEvent` at one server to the delivery at the followers of another.

    Args:
        writer: The address of the server that is written to.
        follower: The address of the server that is followed.
        session: An empty session.
        followers: How many, on up to four connections.
        rate: Events a second.
        seconds: For how long.
    """
    count = _WARM_UP + seconds * rate
    command = [sys.executable, "-m", "tests.bench.live", follower, *map(str, (session, followers, count))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the followers did not come up")
        uvloop.run(_append(writer, session, rate, count))
        out, _ = process.communicate(timeout=_PATIENCE)
    return Delays(*json.loads(out))


def echo(address: str, rate: int, seconds: int) -> Delays:
    """Return the round trip of a unary call to a server that answers what it gets."""
    return uvloop.run(_echo_delays(address, rate, _WARM_UP + seconds * rate))


def idle_followers(address: str, session: int, pid: int, *, followers: int, connections: int) -> float:
    """Return by how many kB each follower that just waits makes the server's memory grow."""
    return uvloop.run(_idle_followers(address, session, pid, followers, connections))


def paused_follower(address: str, session: int, pid: int, *, seconds: int) -> tuple[float, int]:
    """Return the append rate with a follower that takes nothing, and by how many kB the server's memory grew."""
    append_rate([address], session, 5)  # warm
    connected, release = threading.Event(), threading.Event()

    async def pause() -> None:
        first = asyncio.Event()
        connection = await FollowConnection.open(address, lambda *_: first.set(), window=100_000)
        head = pb.GetSessionRequest(session_id=session)
        async with grpc.aio.insecure_channel(address) as channel:
            last = (await CollabServiceStub(channel).GetSession(head)).session.last_server_seq
        connection.follow(pb.ListEventsRequest(session_id=session, since_server_seq=last, follow=True))
        await first.wait()
        connected.set()
        await asyncio.to_thread(release.wait)
        connection.transport.abort()

    paused = threading.Thread(target=lambda: asyncio.run(pause()))
    paused.start()
    connected.wait(_PATIENCE)
    before = resident_kilobytes(pid)
    rate = append_rate([address], session, seconds)
    grown = resident_kilobytes(pid) - before
    release.set()
    paused.join()
    return rate, grown


async def at_rate(call: Callable[[], Awaitable[object]], rate: int, count: int) -> None:
    """Make calls at times that do not depend on when they are answered."""
    started = time.monotonic()
    async with asyncio.TaskGroup() as calls:
        for number in range(count):
            if (pause := started + number / rate - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            calls.create_task(_awaited(call()))


async def _awaited(call: Awaitable[object]) -> None:
    await call


async def _append(address: str, session: int, rate: int, count: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = CollabServiceStub(channel)

        def append() -> Awaitable[object]:
            event = pb.NewEvent(actor_id="ada", type="edit", json=PAYLOAD, client_seq=time.monotonic_ns())
            return stub.AppendEvent(pb.AppendEventRequest(session_id=session, event=event), timeout=_PATIENCE)

        await at_rate(append, rate, count)


async def _echo_delays(address: str, rate: int, count: int) -> Delays:
    delays: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_ECHO)

        async def call() -> None:
            started = time.monotonic_ns()
            await send(PAYLOAD.encode())
            delays.append((time.monotonic_ns() - started) / 1e6)

        await at_rate(call, rate, count)
    return _percentiles(delays[_WARM_UP:])


async def _follow(address: str, session: int, followers: int, count: int) -> None:
    """Follow until every follower has got everything; say when all are there, and the delays in the end."""
    delays: list[float] = []
    last: dict[tuple[int, int], int] = {}
    parsed: dict[bytes, list[tuple[int, int]]] = {}
    loop = asyncio.get_running_loop()
    ready, done = loop.create_future(), loop.create_future()

    def take(connection: int, stream: int, message: bytes) -> None:
        now = time.monotonic_ns()
        follower = (connection, stream)
        if follower not in last:
            last[follower] = 0
            if len(last) == followers:
                ready.set_result(None)
        events = parsed.get(message)  # most messages are the same for everybody
        if events is None:
            decoded = pb.ListEventsResponse.FromString(message).events
            events = parsed[message] = [(event.server_seq, event.client_seq) for event in decoded]
        for server_seq, called_at in events:
            if server_seq != last[follower] + 1:
                raise RuntimeError(f"event {server_seq} came after {last[follower]}")
            last[follower] = server_seq
            if server_seq > _WARM_UP:
                delays.append((now - called_at) / 1e6)
        if len(delays) == followers * (count - _WARM_UP) and not done.done():
            done.set_result(None)

    connections = min(followers, _CONNECTIONS)
    opened = [await FollowConnection.open(address, partial(take, number)) for number in range(connections)]
    for number in range(followers):
        opened[number % connections].follow(pb.ListEventsRequest(session_id=session, follow=True))
    async with asyncio.timeout(_PATIENCE):
        await ready
    print("ready", flush=True)
    async with asyncio.timeout(_PATIENCE + count):
        await done
    print(json.dumps(_percentiles(delays)), flush=True)


async def _idle_followers(address: str, session: int, pid: int, followers: int, connections: int) -> float:
    begun: set[tuple[int, int]] = set()
    everybody = asyncio.Event()

    def take(connection: int, stream: int, _: bytes) -> None:
        begun.add((connection, stream))
        if len(begun) == followers:
            everybody.set()

    before = resident_kilobytes(pid)
    opened = [await FollowConnection.open(address, partial(take, number)) for number in range(connections)]
    for number in range(followers):
        opened[number % connections].follow(pb.ListEventsRequest(session_id=session, follow=True))
    async with asyncio.timeout(_PATIENCE):
        await everybody.wait()
    grown = resident_kilobytes(pid) - before
    for connection in opened:
        connection.transport.abort()
    return grown / followers


def _percentiles(delays: Sequence[float]) -> Delays:
    ordered = sorted(delays)
    return Delays(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])


if __name__ == "__main__":
    uvloop.run(_follow(sys.argv[1], *map(int, sys.argv[2:])))
