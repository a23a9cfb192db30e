"""Much more load than can be carried: callers that send batches again as soon as the service lets them."""

import asyncio
import subprocess
import sys
import time
from typing import NamedTuple

import grpc
import uvloop

from collab_service.v1 import collab_service_pb2 as pb
from tests.bench.load import PAYLOAD

FEW, MANY = 16, 1_600
"""Callers: as many as keep the service busy, and a hundred times as many."""
BATCH = 100
_PATH = "/collab_service.v1.CollabService/AppendEvents"
_CONNECTIONS = 8
_PAUSE = 0.1
"""Seconds that `OVERLOADED` says to wait, in its `RetryInfo`."""


class Outcome(NamedTuple):
    """What callers saw, together."""

    stored: float
    """Events a second."""
    refused: float
    """Refusals a second."""
    refused_p99: float
    """Milliseconds until a refusal."""


def run(address: str, session: int, *, callers: int, seconds: int) -> Outcome:
    """Let so many callers append batches for a while, in a process of their own."""
    command = [sys.executable, "-m", "tests.bench.overload", address, *map(str, (session, callers, seconds))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
    return Outcome(*map(float, result.stdout.split()))


async def _load(address: str, session: int, callers: int, seconds: int) -> Outcome:
    event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", json=PAYLOAD)
    request = pb.AppendEventsRequest(session_id=session, events=[event] * BATCH).SerializeToString()
    stored = 0
    refusals: list[float] = []
    end = time.perf_counter() + seconds
    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(_CONNECTIONS)
    ]

    async def write(channel: grpc.aio.Channel) -> None:
        nonlocal stored
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_PATH)
        while (before := time.perf_counter()) < end:
            try:
                await call(request)
                stored += BATCH
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                refusals.append(1e3 * (time.perf_counter() - before))
                await asyncio.sleep(_PAUSE)

    started = time.perf_counter()
    await asyncio.gather(*(write(channels[n % _CONNECTIONS]) for n in range(callers)))
    took = time.perf_counter() - started
    await asyncio.gather(*(channel.close() for channel in channels))
    refusals.sort()
    return Outcome(stored / took, len(refusals) / took, refusals[len(refusals) * 99 // 100] if refusals else 0.0)


if __name__ == "__main__":
    print(*uvloop.run(_load(sys.argv[1], *map(int, sys.argv[2:]))))
