"""Load on the service and on PostgreSQL alone, each in a process of its own, bounded in count and time."""

import asyncio
import os
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

from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.memory import resident_kilobytes

WRITERS = 64
PAYLOAD = '{"text":"' + "x" * 189 + '"}'
"""200 bytes."""

_PATH = "/collab_service.v1.CollabService/AppendEvent"
_CONNECTIONS = 4

# What everybody writes first: lock the session, take the next number, insert, commit.
_NAIVE = f"""
BEGIN;
SELECT id FROM collab_sessions WHERE id = :session FOR UPDATE;
INSERT INTO collab_events (session_id, server_seq, actor_id, client_seq, type, payload_json, created_at, chain_hash)
    SELECT :session, coalesce(max(server_seq), 0) + 1, 'ada', 7, 'edit', '{PAYLOAD.replace(":", "' || chr(58) || '")}',
        now(), '\\\\x{"ab" * 32}'
    FROM collab_events WHERE session_id = :session;
COMMIT;
"""


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
    event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", json=PAYLOAD)
    request = pb.AppendEventRequest(session_id=session_id, event=event).SerializeToString()
    if load_generator() == "h2load":
        return _h2load(address, request, seconds, writers)
    command = [sys.executable, "-m", "tests.bench.load", address, str(seconds), str(writers)]
    result = subprocess.run(command, input=request, capture_output=True, timeout=seconds + 60, check=True)
    return float(result.stdout)


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


def naive_rate(cluster: Cluster, database_url: str, session_id: int, seconds: int) -> float:
    """Return the transactions per second of pgbench with the naive transaction, as many clients as writers."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(_NAIVE)
        script.flush()
        command = [
            str(cluster.bin / "pgbench"), "--no-vacuum", f"--client={WRITERS}", "--jobs=2", f"--time={seconds}",
            f"--define=session={session_id}", f"--file={script.name}", database_url,
        ]  # fmt: skip
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 60, check=True, env={"PATH": os.defpath}
        )
    found = re.search(r"tps = ([\d.]+)", result.stdout)
    if found is None or "number of failed transactions: 0 " not in result.stdout:
        raise RuntimeError(f"pgbench did not work:\n{result.stdout}\n{result.stderr}")
    return float(found[1])


def read_all(address: str, session_id: int, pid: int) -> tuple[int, float, int]:
    """Read a session back; return the events, the seconds, and by how many kB the server's memory grew at most."""
    with grpc.insecure_channel(address) as channel:
        stub = CollabServiceStub(channel)
        before = most = resident_kilobytes(pid)
        count = 0
        started = time.perf_counter()
        for message in stub.ListEvents(pb.ListEventsRequest(session_id=session_id)):
            if message.events[0].server_seq != count + 1:
                raise RuntimeError(f"a gap after event {count}")
            count += len(message.events)
            most = max(most, resident_kilobytes(pid))
        return count, time.perf_counter() - started, most - before


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
    print(asyncio.run(_aio_load(sys.argv[1], sys.stdin.buffer.read(), float(sys.argv[2]), int(sys.argv[3]))))
