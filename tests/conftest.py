"""A real PostgreSQL for the whole run, a database of its own for every test that asks, and real servers on loopback."""

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory
from collab_service.storage.embedded.accounts import postgres_account
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess, let_starts_be_warm

TRACES = Path(__file__).parent.parent.parent / "shared" / "traces"

_TEMPLATE = "template_collab"
_LONGEST = (
    "cli/test_workers.py",
    "cli/test_serve.py",
    "log/test_following.py",
    "gateway/test_pages.py",
    "cli/test_worker_metrics.py",
    "rpc/test_append_stream.py",
    "rpc/test_concurrent_trace.py",
    "gateway/test_stopping.py",
    "torture/test_run.py",
    "storage/test_embedded.py",
    "cli/test_archive.py",
    "hostile/test_grpc.py",
    "cli/test_append.py",
)
"""The files that take longest, half a minute and more."""


def pytest_configure() -> None:
    """Not on import: the benchmarks and the torture import from here."""
    let_starts_be_warm()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of several processes is left with one in the end."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def run_directory() -> Iterator[Path]:
    """A directory for the run, which PostgreSQL's user may enter, as pytest's own temporary directories are not."""
    directory = Path(tempfile.mkdtemp(prefix="collab-tests-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def directory(run_directory: Path) -> Path:
    """A new empty directory that PostgreSQL's user may enter."""
    path = run_directory / uuid.uuid4().hex[:8]
    path.mkdir()
    path.chmod(0o711)
    return path


@pytest.fixture(scope="session")
def cluster(run_directory: Path) -> Iterator[Cluster]:
    """The PostgreSQL of this run."""
    account = postgres_account()
    assert account is not None
    data = DataDirectory(run_directory / "cluster", account)
    cluster = Cluster(data)
    cluster.start("max_connections=200")
    yield cluster
    # At once: a clean stop writes hundreds of databases to the disk for a minute, and nobody needs them any more.
    os.kill(int((data.cluster / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
    cluster.stop()
    data.release()


@pytest.fixture(scope="session")
def new_database(cluster: Cluster) -> Callable[[], str]:
    """Return a function that makes a migrated database and returns its URL."""
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    schema.migrate(database_url_of(cluster, _TEMPLATE))

    def make() -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(cluster.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        return database_url_of(cluster, name)

    return make


def database_url_of(cluster: Cluster, name: str) -> str:
    """Return the URL of one of the cluster's databases."""
    return cluster.url.replace("/postgres?", f"/{name}?")


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """A migrated database of the test's own."""
    return new_database()


@pytest.fixture(scope="session")
def server_database_url(new_database: Callable[[], str]) -> str:
    """The database behind `server`."""
    return new_database()


def assert_no_call_was_left(process: ServeProcess) -> None:
    """Assert that a server had nothing to wait for when it stopped."""
    assert not [line for line in process.lines if line.get("event") == "the grace period is over"], process.text()


@pytest.fixture(scope="session")
def server(server_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """A running `collab serve` that tests share: each works in sessions of its own."""
    with ServeProcess("--database-url", server_database_url, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0
        assert_no_call_was_left(process)


@pytest.fixture(scope="session")
def second_server(server: ServeProcess, server_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """Another process on the database of `server`, for tests that share both."""
    with ServeProcess("--database-url", server_database_url, cwd=run_directory) as process:
        yield process
        assert process.stop() == 0
        assert_no_call_was_left(process)


@pytest.fixture(scope="session")
def channel(server: ServeProcess) -> Iterator[grpc.Channel]:
    """A channel to the shared server."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> CollabServiceStub:
    """A stub on the shared server."""
    return CollabServiceStub(channel)


@pytest.fixture
def own_cluster(directory: Path) -> Iterator[Cluster]:
    """A PostgreSQL that the test may stop."""
    account = postgres_account()
    assert account is not None
    data = DataDirectory(directory / "data", account)
    cluster = Cluster(data)
    cluster.start()
    schema.migrate(cluster.url)
    yield cluster
    cluster.stop()
    data.release()
