"""Whether a gateway is alive, and ready: without its database, before its service, and while that stops or fails."""

import asyncio
import signal
import socket
from pathlib import Path

import httpx

from collab_service.storage.embedded import Cluster
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import TIMEOUT, append, new_session, open_http, refused
from tests.gateway.event_source import EventSource
from tests.gateway.wire import EVENTS, connected, list_request
from tests.processes import GatewayProcess, ServeProcess
from tests.rpc.calls import events as read_directly
from tests.tcp import TcpProxy
from tests.waiting import until

_END = b"retry: 2000\n\n"
"""What a browser is told when it shall come again."""


def free_address() -> str:
    """Return an address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def becomes(address: str, status: int) -> httpx.Response:
    """Wait until the readiness has this status."""
    answers: list[httpx.Response] = []
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=TIMEOUT, trust_env=False) as http:

        async def has() -> bool:
            answers.append(await http.get("/readyz"))
            return answers[-1].status_code == status

        await until(has, f"/readyz with {status}", seconds=40)
    return answers[-1]


def test_alive_and_ready(http: httpx.Client, gateway: GatewayProcess) -> None:
    """200 with a word, also for HEAD, as load balancers ask."""
    with open_http(gateway.http_address) as other:
        for client in (http, other):
            for path, said in (("/healthz", {"status": "ok"}), ("/readyz", {"status": "ready"})):
                answer = client.get(path)
                assert (answer.status_code, answer.json()) == (200, said)
                assert answer.headers["content-type"] == "application/json"
                head = client.head(path)
                assert (head.status_code, head.content) == (200, b"")


async def test_without_the_database(own_cluster: Cluster, directory: Path) -> None:
    """Alive and not ready; calls are 503 with a reason; a browser is told to come again; and all goes on by itself."""
    with (
        ServeProcess("--database-url", own_cluster.url, cwd=directory) as server,
        open_http(server.http_address) as http,
    ):
        session_id = new_session(http)
        append(http, session_id)
        query = {"sessionId": session_id}
        await becomes(server.http_address, 200)
        await asyncio.to_thread(own_cluster.stop)
        said = (await becomes(server.http_address, 503)).json()
        assert (said["status"], list(said)) == ("not ready", ["status", "cause"])
        assert "database" in said["cause"]
        assert http.get("/healthz").status_code == 200
        for answer in (
            http.get(f"/api/collab/sessions/{session_id}"),
            http.get("/api/collab/sessions"),
            http.get("/api/collab/events", params=query),
            http.get("/api/collab/events", params=query, headers={"accept": "application/x-ndjson"}),
            http.post("/api/collab/events", json=query),
            http.post("/api/collab/sessions", json={}),
        ):
            refused(answer, 503, "STORAGE_UNAVAILABLE")
            assert int(answer.headers["retry-after"]) >= 1
        stream = http.get("/api/collab/events", params=query, headers={"accept": EVENTS})
        assert (stream.status_code, stream.content) == (200, _END)
        assert stream.headers["content-type"].startswith("text/event-stream")
        async with EventSource(server.http_address, session_id) as source:
            await source.until(lambda source: source.clean_ends > 2)
            await asyncio.to_thread(own_cluster.start)
            await source.until(lambda source: source.numbers == [1])
            await becomes(server.http_address, 200)
            assert append(http, session_id)["serverSeq"] == 2
            await source.until(lambda source: source.numbers == [1, 2])
            assert {answer.status for answer in source.answers} == {200}


async def test_started_before_the_service(server_database_url: str, directory: Path) -> None:
    """A gateway whose service is not there is alive and not ready, says so, and becomes ready by itself."""
    target = free_address()
    with GatewayProcess(target, cwd=directory) as gateway, open_http(gateway.http_address) as http:
        said = http.get("/readyz")
        assert (said.status_code, said.json()["cause"]) == (503, "the service does not answer")
        assert http.get("/healthz").status_code == 200
        for answer in (
            http.get("/api/collab/sessions"),
            http.post("/api/collab/sessions", json={}),
            http.post("/api/collab/events", json={"sessionId": 1}),
            http.get("/api/collab/events?sessionId=1"),
        ):
            refused(answer, 503, "STORAGE_UNAVAILABLE")
        stream = http.get("/api/collab/events?sessionId=1", headers={"accept": EVENTS})
        assert (stream.status_code, stream.content) == (200, _END)
        arguments = ("--database-url", server_database_url, "--http-address", "off")
        with ServeProcess(*arguments, cwd=directory, grpc_address=target):
            await becomes(gateway.http_address, 200)
            assert append(http, new_session(http))["serverSeq"] == 1
        assert gateway.stop() == 0


async def test_a_service_that_stops_behind_its_gateway(server_database_url: str, large: int, directory: Path) -> None:
    """While it finishes what is in progress, what is new is 503 `SHUTTING_DOWN`; a browser is told to come again."""
    arguments = ("--database-url", server_database_url, "--http-address", "off", "--shutdown-grace", "60")
    with (
        ServeProcess(*arguments, cwd=directory) as service,
        GatewayProcess(service.grpc_address, cwd=directory) as gateway,
        open_http(gateway.http_address) as http,
    ):
        async with connected(gateway.http_address, small=True) as reader:
            answer = await reader.ask(list_request(large))
            parts = answer.parts()
            assert await anext(parts)
            service.send(signal.SIGTERM)
            await becomes(gateway.http_address, 503)
            for refusal in (
                http.get(f"/api/collab/sessions/{large}"),
                http.post("/api/collab/events", json={"sessionId": large}),
                http.get(f"/api/collab/events?sessionId={large}"),
            ):
                refused(refusal, 503, "SHUTTING_DOWN")
            stream = http.get(f"/api/collab/events?sessionId={large}", headers={"accept": EVENTS})
            assert (stream.status_code, stream.content) == (200, _END)
            reader.cut()
        assert service.wait() == 0
        assert gateway.stop() == 0


async def test_an_answer_that_is_lost(server: ServeProcess, stub: CollabServiceStub, directory: Path) -> None:
    """An append whose answer was lost is 503 `COMMIT_OUTCOME_UNKNOWN`; with its key it is found to be stored, once."""
    async with TcpProxy(server.grpc_address) as proxy:
        with GatewayProcess(proxy.address, cwd=directory) as gateway:
            async with httpx.AsyncClient(
                base_url=f"http://{gateway.http_address}", timeout=TIMEOUT, trust_env=False
            ) as cut:
                session_id = (await cut.post("/api/collab/sessions", json={})).json()["id"]
                body = {"sessionId": session_id, "idempotencyKey": "k"}
                proxy.lose_answer()
                refused(await cut.post("/api/collab/events", json=body), 503, "COMMIT_OUTCOME_UNKNOWN")
                assert proxy.cuts == 1

                async def stored() -> bool:
                    return bool(read_directly(stub, session_id))

                await until(stored, "the append")
                again = await cut.post("/api/collab/events", json=body)
                assert (again.status_code, again.json()["serverSeq"]) == (200, 1)
                proxy.lose_answer()
                refused(await cut.get(f"/api/collab/sessions/{session_id}"), 503, "STORAGE_UNAVAILABLE")
            gateway.process.kill()
            gateway.wait()
