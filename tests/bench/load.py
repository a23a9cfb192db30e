"""Load on the service, one event a call, in processes of its own, bounded in count and time."""

import asyncio
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import uvloop

from collab_service.v1 import collab_service_pb2 as pb

WRITERS = 64
PAYLOAD = '{"text":"' + "x" * 189 + '"}'
"""200 bytes."""

_PATH = "/collab_service.v1.CollabService/AppendEvent"
_CONNECTIONS = 4


def load_generator() -> str:
    """Return the name of the generator that `append_rate` uses here."""
    return "h2load" if shutil.which("h2load") else "a grpc.aio client"


def append_rate(addresses: Sequence[str], session_id: int, seconds: int, writers: int = WRITERS) -> float:
    """Return the unary appends per second of so many writers on one session, each waiting for its answer.

    The writers are spread evenly over the servers.
    """
    share = writers // len(addresses)
    with ThreadPoolExecutor(len(addresses)) as pool:
        return sum(pool.map(lambda address: _append_rate(address, session_id, seconds, share), addresses))


def _append_rate(address: str, session_id: int, seconds: int, writers: int) -> float:
    if load_generator() == "h2load":
        return _h2load(address, _request(session_id), seconds, writers)
    return python_append_rate(address, session_id, seconds, writers)


def python_append_rate(address: str, session_id: int, seconds: int, writers: int = WRITERS) -> float:
    """Return what `append_rate` does, whatever generators there are, of a grpc.aio client in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.load", address, str(seconds), str(writers)]
    result = subprocess.run(command, input=_request(session_id), capture_output=True, timeout=seconds + 60, check=True)
    return float(result.stdout)


def _request(session_id: int) -> bytes:
    event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", json=PAYLOAD)
    return pb.AppendEventRequest(session_id=session_id, event=event).SerializeToString()


def _h2load(address: str, request: bytes, seconds: int, writers: int) -> float:
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0" + struct.pack(">I", len(request)) + request)
        body.flush()
        connections = min(_CONNECTIONS, writers)
        return h2load(
            f"--clients={connections}", f"--max-concurrent-streams={writers // connections}", f"--duration={seconds}",
            f"--data={body.name}", "--header=content-type: application/grpc", "--header=te: trailers",
            f"http://{address}{_PATH}", seconds=seconds,
        )  # fmt: skip


def h2load(*arguments: str, seconds: int) -> float:
    """Run h2load and return the requests per second, all of which have to be answered with success."""
    result = subprocess.run(["h2load", *arguments], capture_output=True, text=True, timeout=seconds + 60, check=True)
    done = re.search(r"finished in [\d.]+s, ([\d.]+) req/s", result.stdout)
    codes = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", result.stdout)
    if done is None or codes is None or any(int(count) for count in codes.groups()[1:]):
        raise RuntimeError(f"h2load did not work:\n{result.stdout}")
    return float(done[1])


async def _aio_load(address: str, request: bytes, seconds: float, writers: int) -> float:
    """Append as `append_rate` says."""
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


if __name__ == "__main__":
    print(uvloop.run(_aio_load(sys.argv[1], sys.stdin.buffer.read(), float(sys.argv[2]), int(sys.argv[3]))))
