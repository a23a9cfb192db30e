"""The order of a stop: not ready, then what follows ends, then what is in progress is finished; exit status 0."""

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import TIMEOUT, refused
from tests.gateway.event_source import EventSource
from tests.gateway.wire import ARRAY, EVENTS, Connection, WireError, connected, list_request, request_bytes
from tests.processes import GatewayProcess, ServeProcess, ServingProcess
from tests.rpc.calls import append, new_session
from tests.tcp import TcpProxy
from tests.waiting import until

_END = b"retry: 2000\n\n"
"""What a browser is told when it shall come again."""

Start = Callable[..., ServingProcess]


@pytest.fixture(params=["serve", "two workers", "gateway"])
def start(request: pytest.FixtureRequest, server: ServeProcess, server_database_url: str, directory: Path) -> Start:
    """A function that starts a gateway, in each way that there is."""

    def start(*arguments: str) -> ServingProcess:
        if request.param == "gateway":
            return GatewayProcess(server.grpc_address, *arguments, cwd=directory)
        workers = ("--workers", "2") if request.param == "two workers" else ()
        return ServeProcess("--database-url", server_database_url, *workers, *arguments, cwd=directory)

    return start


async def readiness(connection: Connection) -> int | None:
    """Ask whether it is ready, and return the status; None when the connection is closed."""
    try:
        answer = await connection.ask(request_bytes("/readyz"))
        await answer.body()
    except (WireError, OSError, asyncio.IncompleteReadError):
        return None
    return answer.status


async def test_a_stop_in_order(start: Start, large: int, stub: CollabServiceStub) -> None:
    """SIGTERM: not ready, streams that follow end as they should, a list is finished, connections close, status 0."""
    session_id = append(stub, new_session(stub)).event.session_id
    with start() as process:
        async with AsyncExitStack() as stack:

            async def connect(*, small: bool = False) -> Connection:
                return await stack.enter_async_context(connected(process.http_address, small=small))

            asking, reading, late = await connect(), await connect(small=True), await connect()
            sources = [
                await stack.enter_async_context(EventSource(process.http_address, session_id, once=True))
                for _ in range(4)  # so that no worker is without one
            ]
            for source in sources:
                await source.until(lambda source: source.heads == [1])
            answer = await reading.ask(list_request(large))
            parts = answer.parts()
            body = bytearray(await anext(parts))
            assert await readiness(asking) == 200

            process.send(signal.SIGTERM)
            while (status := await readiness(asking)) == 200:
                pass
            assert status == 503
            late_answer = await late.ask(list_request(session_id, EVENTS))
            assert (late_answer.status, await late_answer.body()) == (200, _END)
            for source in sources:
                await source.until_ended()
                assert (source.numbers, source.clean_ends, source.cuts) == ([1], 1, 0)
            assert await readiness(asking) in (503, None)

            async for part in parts:
                body += part
            assert [event["serverSeq"] for event in json.loads(body)] == list(range(1, 2_001))
            assert process.wait() == 0
    assert not [line for line in process.lines if line.get("level") not in ("info", None)], process.text()


async def test_a_second_signal_ends_it_at_once(start: Start, large: int) -> None:
    """However long the grace period is, and whatever is in progress; what is in progress is cut."""
    with start("--shutdown-grace", "600") as process:
        async with connected(process.http_address, small=True) as reading:
            answer = await reading.ask(list_request(large, ARRAY))
            parts = answer.parts()
            assert await anext(parts)
            process.send(signal.SIGTERM)
            await asyncio.to_thread(process.wait_for, "stopping")
            for worker in range(1, 1 + process.wait_for("serving").get("workers", 0)):
                await asyncio.to_thread(process.wait_for, "stopping", worker=worker)
            process.send(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
            with pytest.raises(WireError):
                async for _ in parts:
                    pass
    assert not [line for line in process.lines if line.get("level") == "error"], process.text()


async def test_a_follower_that_does_not_read_delays_no_stop(start: Start, large: int) -> None:
    """One that takes nothing, as a browser's page that sleeps, is let go of; however long the grace period is."""
    with start("--shutdown-grace", "600") as process:
        async with connected(process.http_address, small=True) as reading:
            answer = await reading.ask(list_request(large, EVENTS))
            parts = answer.parts()
            for _ in range(3):
                assert await anext(parts)
            assert await asyncio.to_thread(process.stop) == 0


async def test_the_grace_period_is_over(server: ServeProcess, directory: Path) -> None:
    """What is not answered by then is told so: what reads can be sent again, of what writes the outcome is unknown."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(server.grpc_address))
        gateway = stack.enter_context(GatewayProcess(proxy.address, "--shutdown-grace", "1", cwd=directory))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{gateway.http_address}", timeout=TIMEOUT, trust_env=False)
        )
        session_id = (await http.post("/api/collab/sessions", json={})).json()["id"]
        proxy.hold()
        calls = proxy.calls
        reading = asyncio.create_task(http.get(f"/api/collab/sessions/{session_id}"))
        listing = asyncio.create_task(http.get(f"/api/collab/events?sessionId={session_id}"))
        writing = asyncio.create_task(http.post("/api/collab/events", json={"sessionId": session_id}))

        async def sent() -> bool:
            return proxy.calls == calls + 3

        await until(sent, "three calls")
        gateway.send(signal.SIGTERM)
        refused(await reading, 503, "SHUTTING_DOWN")
        refused(await listing, 503, "SHUTTING_DOWN")
        refused(await writing, 503, "COMMIT_OUTCOME_UNKNOWN")
        assert await asyncio.to_thread(gateway.wait) == 0
