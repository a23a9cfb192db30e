"""Writers as a process of their own: each appends an event, waits for its answer, and appends the next.

They are a grpc.aio client, as programs that use the service are, which takes every call's time: from the call to its
answer in the client, what the client itself takes included. The sessions are written to in turn.
"""

import asyncio
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Sequence

import grpc
import msgspec
import uvloop
from msgspec import Struct

from collab_service.v1 import collab_service_pb2 as pb
from tests.bench.live import Delays
from tests.bench.percentiles import percentiles

_PATH = "/collab_service.v1.CollabService/AppendEvent"
_CONNECTIONS = 4
_WARM_UP = 0.5
"""Seconds that are not counted."""
_PATIENCE = 60.0


class Written(Struct, frozen=True):
    """What came of it."""

    rate: float
    """Appends a second."""
    delays: Delays
    busy: float
    """How much of a core the writers' own process took."""


class _Load(Struct, frozen=True):
    address: str
    sessions: list[int]
    writers: int
    payload_bytes: int
    seconds: float


def write(address: str, sessions: Sequence[int], *, writers: int, seconds: float, payload_bytes: int = 200) -> Written:
    """Append for so many seconds, and on until every session has been written to.

    Args:
        address: The server's.
        sessions: Where to append to, in turn.
        writers: How many append at the same time.
        seconds: For how long, after a warm-up.
        payload_bytes: What each event holds; it cannot be compressed.

    Raises:
        subprocess.CalledProcessError: A call failed.
    """
    load = _Load(address, list(sessions), writers, payload_bytes, seconds)
    command = [sys.executable, "-m", "tests.bench.writers"]
    result = subprocess.run(
        command, input=msgspec.json.encode(load), stdout=subprocess.PIPE, timeout=seconds + _PATIENCE, check=True
    )
    return msgspec.json.decode(result.stdout, type=Written)


async def _write(load: _Load) -> Written:
    payload = random.Random(1).randbytes(load.payload_bytes)
    event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", binary=payload)
    requests = [pb.AppendEventRequest(session_id=session, event=event).SerializeToString() for session in load.sessions]
    turns = itertools.count()
    delays: list[float] = []
    counted_from = time.perf_counter() + _WARM_UP
    until = counted_from + load.seconds

    async def append(channel: grpc.aio.Channel) -> None:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_PATH)
        while (turn := next(turns)) < len(requests) or time.perf_counter() < until:
            called_at = time.perf_counter()
            await call(requests[turn % len(requests)], timeout=_PATIENCE)
            answered_at = time.perf_counter()
            if answered_at > counted_from:
                delays.append((answered_at - called_at) * 1e3)

    channels = [
        grpc.aio.insecure_channel(load.address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(min(_CONNECTIONS, load.writers))
    ]
    started, cpu_before = time.perf_counter(), time.process_time()
    await asyncio.gather(*(append(channels[number % len(channels)]) for number in range(load.writers)))
    ended, cpu_after = time.perf_counter(), time.process_time()
    await asyncio.gather(*(channel.close() for channel in channels))
    return Written(
        rate=len(delays) / (ended - counted_from),
        delays=percentiles(delays),
        busy=(cpu_after - cpu_before) / (ended - started),
    )


if __name__ == "__main__":
    written = uvloop.run(_write(msgspec.json.decode(sys.stdin.buffer.read(), type=_Load)))
    sys.stdout.buffer.write(msgspec.json.encode(written))
