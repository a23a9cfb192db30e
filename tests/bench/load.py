"""Load on the service, one event a call, in a process of its own, bounded in count and time."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence

import grpc
import uvloop

from collab_service.v1 import collab_service_pb2 as pb
from tests.bench.repeat import Repeated

WRITERS = 64
PAYLOAD = '{"text":"' + "x" * 189 + '"}'
"""200 bytes."""

_PATH = "/collab_service.v1.CollabService/AppendEvent"
_CONNECTIONS = 4
"""To each server."""
_PATIENCE = 60.0


def append_rate(addresses: Sequence[str], session_id: int, seconds: int, writers: int = WRITERS) -> float:
    """Return the unary appends per second of so many writers on one session, each waiting for its answer.

    The writers are spread evenly over the servers. All of them have to succeed.
    """
    return _run("repeated", ",".join(addresses), session_id, seconds, writers)


def grpc_append_rate(address: str, session_id: int, seconds: int, writers: int = WRITERS) -> float:
    """Return what `append_rate` does, of a grpc.aio client."""
    return _run("grpc.aio", address, session_id, seconds, writers)


def _run(client: str, addresses: str, session_id: int, seconds: int, writers: int) -> float:
    command = [sys.executable, "-m", "tests.bench.load", client, addresses, str(seconds), str(writers)]
    event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", json=PAYLOAD)
    request = pb.AppendEventRequest(session_id=session_id, event=event).SerializeToString()
    result = subprocess.run(command, input=request, capture_output=True, timeout=seconds + 2 * _PATIENCE, check=True)
    return float(result.stdout)


async def _repeated_load(addresses: Sequence[str], request: bytes, seconds: float, writers: int) -> float:
    share = writers // len(addresses)
    count = min(_CONNECTIONS, share)
    connections = [
        Repeated(address, _PATH, request, at_once=share // count) for address in addresses for _ in range(count)
    ]
    started = time.perf_counter()
    for connection in connections:
        await connection.connect()
    await asyncio.wait([connection.closed for connection in connections], timeout=seconds)
    for connection in connections:
        connection.stop()
    answers, took = sum(connection.answers for connection in connections), time.perf_counter() - started
    if any(connection.failures or connection.closed.done() for connection in connections):
        raise RuntimeError(f"calls failed: {[dict(connection.failures) for connection in connections]}")
    return answers / took


async def _grpc_load(address: str, request: bytes, seconds: float, writers: int) -> float:
    count = 0
    started = time.perf_counter()

    async def write(channel: grpc.aio.Channel) -> None:
        nonlocal count
        call = channel.unary_unary(_PATH, bytes, bytes)
        while time.perf_counter() - started < seconds:
            await call(request)
            count += 1

    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(min(_CONNECTIONS, writers))
    ]
    await asyncio.gather(*(write(channels[n % len(channels)]) for n in range(writers)))
    rate = count / (time.perf_counter() - started)
    await asyncio.gather(*(channel.close() for channel in channels))
    return rate


def _main() -> float:
    client, addresses, seconds, writers = sys.argv[1:]
    request = sys.stdin.buffer.read()
    if client == "grpc.aio":
        return uvloop.run(_grpc_load(addresses, request, float(seconds), int(writers)))
    return uvloop.run(_repeated_load(addresses.split(","), request, float(seconds), int(writers)))


if __name__ == "__main__":
    print(_main())
