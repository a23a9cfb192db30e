"""Load that is more than one event a call: through the client's appender, and in batches. Each a process of its own."""

import asyncio
import itertools
import subprocess
import sys
import time
from typing import NamedTuple

import grpc
import uvloop

from collab_service.client import CollabClient, NewEvent
from collab_service.v1 import collab_service_pb2 as pb
from tests.bench.load import PAYLOAD

BATCH = 100
"""Events in a batch."""
_BATCHES = "/collab_service.v1.CollabService/AppendEvents"
_LIST = "/collab_service.v1.CollabService/ListEvents"
_CALLERS, _CONNECTIONS = 16, 4
_KEY = "key-00000000"


class Rate(NamedTuple):
    """Events a second, and milliseconds until each caller's acknowledgement."""

    events: float
    p50: float
    p99: float


def appender_rate(address: str, session: int, *, coroutines: int, seconds: int) -> Rate:
    """Return what coroutines that each wait for their acknowledgement reach together, through one appender."""
    return Rate(*map(float, _run("appender", address, session, coroutines, seconds)))


def batch_rate(address: str, session: int, *, seconds: int) -> float:
    """Return the events a second of callers that append batches of 100, each with an idempotency key of its own."""
    return float(_run("batches", address, session, _CALLERS, seconds)[0])


def read_rate(address: str, session: int, count: int) -> float:
    """Return the events a second that `CollabClient.read` yields, decoded."""
    return float(_run("read", address, session, count, 0)[0])


def drain_rate(address: str, session: int, count: int) -> float:
    """Return the events a second of a `ListEvents` whose messages are counted and not decoded."""
    return float(_run("drain", address, session, count, 0)[0])


def _run(what: str, address: str, session: int, number: int, seconds: int) -> list[str]:
    command = [sys.executable, "-m", "tests.bench.streams", what, address, str(session), str(number), str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
    if result.returncode:
        raise RuntimeError(f"the load did not work:\n{result.stderr}")
    return result.stdout.split()


async def _appender(address: str, session: int, coroutines: int, seconds: int) -> Rate:
    event = NewEvent(PAYLOAD, actor_id="ada", client_seq=7, type="edit")
    delays: list[float] = []
    started = time.perf_counter()
    async with CollabClient(address) as client, client.appender() as appender:

        async def write() -> None:
            before = time.perf_counter()
            while before - started < seconds:
                await appender.append(session, event)
                now = time.perf_counter()
                delays.append(1e3 * (now - before))
                before = now

        await asyncio.gather(*(write() for _ in range(coroutines)))
        rate = len(delays) / (time.perf_counter() - started)
    delays.sort()
    return Rate(rate, delays[len(delays) // 2], delays[len(delays) * 99 // 100])


async def _batches(address: str, session: int, callers: int, seconds: int) -> float:
    events = [pb.NewEvent(actor_id="ada", client_seq=7, type="edit", json=PAYLOAD) for _ in range(BATCH)]
    events[0].idempotency_key = _KEY
    request = pb.AppendEventsRequest(session_id=session, events=events).SerializeToString()
    before_key, after_key = request.split(_KEY.encode())
    keys = map(b"key-%08d".__mod__, itertools.count())
    count = 0
    started = time.perf_counter()

    async def write(channel: grpc.aio.Channel) -> None:
        nonlocal count
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_BATCHES)
        while time.perf_counter() - started < seconds:
            await call(before_key + next(keys) + after_key)
            count += BATCH

    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(_CONNECTIONS)
    ]
    await asyncio.gather(*(write(channels[n % _CONNECTIONS]) for n in range(callers)))
    rate = count / (time.perf_counter() - started)
    await asyncio.gather(*(channel.close() for channel in channels))
    return rate


async def _read(address: str, session: int, count: int) -> float:
    async with CollabClient(address) as client:
        started = time.perf_counter()
        read = 0
        async for page in client.read_pages(session):
            read += len(page.events)
        seconds = time.perf_counter() - started
    if read != count:
        raise RuntimeError(f"{read} events came, not {count}")
    return count / seconds


def _drain(address: str, session: int, count: int) -> float:
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_LIST)
        started = time.perf_counter()
        last = b""
        for message in call(pb.ListEventsRequest(session_id=session).SerializeToString()):
            last = message
        seconds = time.perf_counter() - started
    if pb.ListEventsResponse.FromString(last).through_server_seq != count:
        raise RuntimeError("the log did not come to its end")
    return count / seconds


def _main(what: str, address: str, session: int, number: int, seconds: int) -> None:
    if what == "appender":
        print(*uvloop.run(_appender(address, session, number, seconds)))
    elif what == "batches":
        print(uvloop.run(_batches(address, session, number, seconds)))
    elif what == "read":
        print(uvloop.run(_read(address, session, number)))
    else:
        print(_drain(address, session, number))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
