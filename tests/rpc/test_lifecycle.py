"""Stopping and losing the database: nothing acknowledged is lost, nothing in progress is cut, health tells."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collab_service.rpc.status import DETAILS_KEY
from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, Failure, append, events, failure, new_session
from tests.waiting import until as async_until

SERVING, NOT_SERVING = 1, 2


def until(holds: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what
        pause.wait(0.02)


def test_a_stop_in_the_middle_of_writing(database_url: str, directory: Path) -> None:
    """Writers that are interrupted by a stop: exit status 0, and exactly what was acknowledged is stored."""
    acknowledged: list[int] = []
    with ServeProcess("--database-url", database_url, cwd=directory) as server:
        with grpc.insecure_channel(server.grpc_address) as channel:
            stub = CollabServiceStub(channel)
            session = new_session(stub)
            reasons: set[str] = set()

            def write() -> None:
                while True:
                    try:
                        acknowledged.append(append(stub, session).event.server_seq)
                    except grpc.RpcError as error:
                        reasons.add(Failure(error).reason)
                        return

            writers = [threading.Thread(target=write) for _ in range(8)]
            for writer in writers:
                writer.start()
            until(lambda: len(acknowledged) > 100, "some appends")
            assert server.stop() == 0
            for writer in writers:
                writer.join()
        assert reasons == {"SHUTTING_DOWN"}
        assert not [line for line in server.lines if line.get("event") in ("appends were cut off", "Traceback")]
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stored = [event.server_seq for event in events(CollabServiceStub(channel), session)]
    assert stored == list(range(1, len(stored) + 1))
    assert sorted(acknowledged) == stored


async def test_a_stop_in_the_middle_of_writing_by_many(database_url: str, directory: Path) -> None:
    """However busy the server is, a call is refused with a reason, or finds nobody; none is cancelled without a word.

    Which grpc does with calls that have arrived and not begun. Callers that go on at once have some there at any time.
    """
    with ServeProcess("--database-url", database_url, cwd=directory) as server:
        with grpc.insecure_channel(server.grpc_address) as channel:
            session_id = new_session(CollabServiceStub(channel))
        request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent())
        codes: Counter[grpc.StatusCode] = Counter()
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(server.grpc_address, options))
                for _ in range(4)
            ]

            async def write(channel: grpc.aio.Channel) -> None:
                append_event = CollabServiceStub(channel).AppendEvent
                while True:
                    try:
                        await append_event(request, timeout=TIMEOUT)
                        codes[grpc.StatusCode.OK] += 1
                    except grpc.aio.AioRpcError as error:
                        codes[error.code()] += 1
                        if DETAILS_KEY not in dict(error.trailing_metadata()):
                            return  # it has found nobody
                        assert Failure(error).reason == "SHUTTING_DOWN"

            async def are_writing() -> bool:
                return codes[grpc.StatusCode.OK] > 500

            writers = [asyncio.create_task(write(channels[number % 4])) for number in range(100)]
            await async_until(are_writing, "some appends")
            assert await asyncio.to_thread(server.stop) == 0
            await asyncio.gather(*writers)
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_streams_that_only_watch_do_not_delay_the_stop(database_url: str, directory: Path) -> None:
    """A load balancer that watches the health sees the server leave, and the server leaves at once."""
    with (
        ServeProcess("--database-url", database_url, "--shutdown-grace", "20", cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 10
        assert next(watch).status == NOT_SERVING


def test_the_database_goes_and_comes(own_cluster: Cluster, directory: Path) -> None:
    """Without the database: health says so, calls fail with a reason and a pause; with it again, all goes on."""
    with (
        ServeProcess("--database-url", own_cluster.url, cwd=directory) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)

        def status() -> int:
            return int(health.Check(health_pb2.HealthCheckRequest()).status)

        session = new_session(stub)
        append(stub, session)
        assert status() == SERVING
        own_cluster.stop()
        until(lambda: status() == NOT_SERVING, "health")
        for call in (
            lambda: append(stub, session),
            lambda: new_session(stub),
            lambda: events(stub, session),
        ):
            failed = failure(call)
            assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
            assert failed.metadata == {"side_effects": "none"}
            assert failed.retry_seconds > 0
        own_cluster.start()
        until(lambda: status() == SERVING, "health")
        assert append(stub, session).event.server_seq == 2
        assert len(events(stub, session)) == 2
