"""`collab doctor`: whether the service is there and well, and if not, what is wrong and what to do."""

import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collab_service.cli import doctor
from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.gate import Gate, wait_until
from tests.cli.here import Here
from tests.conftest import database_url_of
from tests.processes import COLLAB, ServeProcess, clean_environment
from tests.rpc.calls import TIMEOUT, new_session


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which tests run may be slow."""
    monkeypatch.setattr(doctor, "_SLOW", 3600.0)


def checks(here: Here, *arguments: object, status: int) -> dict[str, tuple[bool, str]]:
    """Run it and return what it says of each check."""
    ended = here.run("doctor", *arguments)
    assert (ended.status, ended.err) == (status, "")
    found = {}
    for line in ended.out.splitlines():
        mark, check, message = line.split(None, 2)
        assert mark in ("ok", "BAD")
        assert check not in found
        found[check] = (mark == "ok", message)
    return found


def sessions_of_the_doctor(stub: CollabServiceStub) -> list[int]:
    """Return the sessions that it has left behind."""
    request = pb.ListSessionsRequest(owner_id="collab doctor")
    return [session.id for session in stub.ListSessions(request, timeout=TIMEOUT).sessions]


def test_all_is_well(here: Here, stub: CollabServiceStub, server_database_url: str) -> None:
    """Every check is told with what was seen, the status is 0, and the session it wrote to is gone."""
    found = checks(here, "--database-url", server_database_url, status=0)
    assert list(found) == ["database", "reachable", "reading", "writing", "clock"]
    assert all(ok for ok, _ in found.values())
    assert "5 were read back, and their chain holds" in found["writing"][1]
    assert sessions_of_the_doctor(stub) == []


def test_json(here: Here) -> None:
    """`--output json` prints an object for each check."""
    found = here.json("doctor")
    assert [list(check) for check in found] == 4 * [["check", "ok", "message"]]
    assert [(check["check"], check["ok"]) for check in found] == [
        ("reachable", True),
        ("reading", True),
        ("writing", True),
        ("clock", True),
    ]


def test_read_only_writes_nothing(here: Here, server_database_url: str) -> None:
    """With `--read-only` no session is created, not even for a moment."""

    def last_id() -> object:
        with psycopg.connect(server_database_url) as connection:
            return connection.execute("SELECT last_value FROM collab_sessions_id_seq").fetchone()

    before = last_id()
    assert list(checks(here, "--read-only", status=0)) == ["reachable", "reading"]
    assert last_id() == before
    checks(here, status=0)
    assert last_id() != before


def test_what_is_slow_or_late_is_told(here: Here, stub: CollabServiceStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append that takes too long, and clocks that differ, are told with what to look at, and status 6."""
    monkeypatch.setattr(doctor, "_SKEW", -1.0)  # any two clocks differ by more
    ok, message = checks(here, status=6)["clock"]
    assert not ok
    assert "NTP" in message
    monkeypatch.setattr(doctor, "_SLOW", 0.0)
    ok, message = checks(here, status=6)["writing"]
    assert not ok
    assert "look at the disk" in message
    assert sessions_of_the_doctor(stub) == []


def test_no_service(here: Here) -> None:
    """Where nothing listens the status is 3, and what to start is told."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ((check, (ok, message)),) = checks(here, "--target", address, status=3).items()
    assert (check, ok) == ("reachable", False)
    assert message.startswith(f"nothing that speaks gRPC answers at {address}")
    assert message.endswith("collab serve")


def test_no_address(here: Here) -> None:
    """What is no address is a wrong command line, as for all commands."""
    assert "looks like 127.0.0.1:50051" in here.refused("doctor", "--target", "localhost", status=2)


class _Page(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web_server() -> Iterator[str]:
    """The address of a server that speaks HTTP and no gRPC."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def other_service() -> Iterator[str]:
    """The address of a gRPC server that is another service."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_port_that_is_another(here: Here, web_server: str, other_service: str) -> None:
    """A server that speaks HTTP, and a gRPC service that is none of ours, are told apart."""
    (_, message) = checks(here, "--target", web_server, status=3)["reachable"]
    assert message.startswith(f"nothing that speaks gRPC answers at {web_server}")
    (_, message) = checks(here, "--target", other_service, status=6)["reachable"]
    assert message.startswith(f"what answers at {other_service} is no collab-service")
    assert "is no collab-service" in here.refused("list", 1, "--target", other_service, status=1)
    assert "nothing that speaks gRPC" in here.refused("list", 1, "--target", web_server, status=3)


def test_a_port_that_never_answers(here: Here) -> None:
    """What accepts connections and says nothing is not waited for for long."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        (_, message) = checks(here, "--target", address, status=3)["reachable"]
        assert message.startswith(f"nothing that speaks gRPC answers at {address} (")


def test_a_service_without_its_database(here: Here, own_cluster: Cluster, directory: Path) -> None:
    """It is there and cannot work: status 3, for every command, and with the database's URL what is wrong with that."""
    with ServeProcess("--database-url", own_cluster.url, cwd=directory) as server:
        address = server.grpc_address
        own_cluster.stop()
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def is_serving() -> bool:
                response = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
                return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

            wait_until(lambda: not is_serving(), "the service to notice")
        found = checks(here, "--target", address, "--database-url", own_cluster.url, status=3)
        assert [(check, ok) for check, (ok, _) in found.items()] == [("database", False), ("reachable", False)]
        assert "it cannot be used" in found["database"][1]
        assert "cannot work just now" in found["reachable"][1]
        assert "cannot work just now" in here.refused("list", 1, "--target", address, status=3)


def test_a_database_that_is_not_ready(here: Here, cluster: Cluster) -> None:
    """One without a schema, one that is not there, and what is no URL: status 6, and no password is shown."""
    name = f"bare_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    for url, words in (
        (database_url_of(cluster, name), "has no schema yet; run: collab migrate"),
        (database_url_of(cluster, "missing"), "it cannot be used: "),
        ("mysql://collab:sEcret@db.internal/collab", "postgresql://user:password@host:5432/database"),
    ):
        found = checks(here, "--database-url", url, status=6)
        ok, message = found["database"]
        assert not ok
        assert words in message
        assert "sEcret" not in message
        assert all(ok for check, (ok, _) in found.items() if check != "database")


def test_ctrl_c_leaves_nothing_behind(server: ServeProcess, stub: CollabServiceStub, server_database_url: str) -> None:
    """Interrupted while it writes, it still deletes its session."""
    session_id = new_session(stub) + 1  # which it will create
    command = [*COLLAB, "doctor", "--target", server.grpc_address]
    with (
        Gate(server_database_url, session_id, after=2) as gate,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
        ) as process,
    ):
        gate.wait_for_knock()
        process.send_signal(signal.SIGINT)
        gate.open()
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (130, "")
    assert len(out.splitlines()) == 2
    assert sessions_of_the_doctor(stub) == []
