"""`collab serve` as its operators meet it: a process with arguments, signals, log lines and an exit status."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import grpc
import psycopg
import pytest
import typer
from psycopg import sql

from collab_service.cli.main import app
from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.conftest import database_url_of
from tests.processes import ServeProcess, clean_environment, collab
from tests.waiting import until

_CALL_SECONDS = 20


def append(stub: CollabServiceStub, session_id: int, json: str) -> pb.Event:
    """Append an event."""
    request = pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent(json=json))
    return stub.AppendEvent(request, timeout=_CALL_SECONDS).event


def new_session(stub: CollabServiceStub, room: str | None = None) -> int:
    """Create a session."""
    return stub.CreateSession(pb.CreateSessionRequest(room=room), timeout=_CALL_SECONDS).session.id


def read(stub: CollabServiceStub, session_id: int) -> list[str]:
    """Read a session and return its payloads; the numbers are checked."""
    request = pb.ListEventsRequest(session_id=session_id)
    events = [event for message in stub.ListEvents(request, timeout=_CALL_SECONDS) for event in message.events]
    assert [event.server_seq for event in events] == list(range(1, len(events) + 1))
    return [event.json for event in events]


def assert_discreet(text: str, *secrets: str) -> None:
    """Assert that an output shows neither a traceback nor a secret."""
    assert "Traceback" not in text
    assert 'File "' not in text
    for secret in secrets:
        assert secret not in text


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    """Assert that a command has failed, and its last words are one sentence that says why."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert result.stderr.count("collab: ") == 1
    assert last.startswith("collab: ")
    for word in words:
        assert word in last
    assert_discreet(result.stderr, "sEcret")


def life_cycle(process: ServeProcess) -> list[str]:
    """Return what a server has said of its life, in order."""
    lines = {"postgres started", "serving", "stopping", "stopped", "postgres stopped"}
    return [line["event"] for line in process.lines if line["event"] in lines]


def password_of(url: str) -> str:
    """Return the password in a database URL."""
    return str(psycopg.conninfo.conninfo_to_dict(url)["password"])


@pytest.fixture(scope="module")
def embedded_directory(run_directory: Path) -> Path:
    """The data directory of `embedded`."""
    return run_directory / "serve data"


@pytest.fixture(scope="module")
def embedded(embedded_directory: Path, run_directory: Path) -> Iterator[ServeProcess]:
    """A server with a PostgreSQL of its own, for tests that leave it running."""
    with ServeProcess("--data-dir", str(embedded_directory), cwd=run_directory) as process:
        yield process
        assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_status_0(database_url: str, directory: Path, number: signal.Signals) -> None:
    """SIGTERM, Ctrl-C and a closed terminal stop it cleanly, a line for each change; what it said holds no secret."""
    with ServeProcess("--database-url", database_url, cwd=directory) as process:
        with grpc.insecure_channel(process.grpc_address) as channel:
            stub = CollabServiceStub(channel)
            assert read(stub, append(stub, new_session(stub), '{"a":1}').session_id) == ['{"a":1}']
        assert process.stop(number) == 0
    assert life_cycle(process) == ["serving", "stopping", "stopped"]
    assert_discreet(process.text(), password_of(database_url))
    assert list(directory.iterdir()) == []


def test_started_again_everything_is_there(directory: Path) -> None:
    """A server with a PostgreSQL of its own is stopped and started on the same directory: nothing is gone."""
    data = directory / "data"
    kept: list[str] = []
    for turn, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        with ServeProcess(cwd=directory, COLLAB_DATA_DIR=str(data)) as process:
            with grpc.insecure_channel(process.grpc_address) as channel:
                stub = CollabServiceStub(channel)
                session_id = new_session(stub, room="the same")
                assert read(stub, session_id) == kept
                kept.append(f'{{"turn":{turn}}}')
                append(stub, session_id, kept[-1])
            assert process.stop(number) == 0
        assert life_cycle(process) == ["postgres started", "serving", "stopping", "stopped", "postgres stopped"]
        assert_discreet(process.text(), (data / "password").read_text())
        assert not (data / "postgres" / "postmaster.pid").exists()


def test_a_second_server_on_the_directory_is_refused(embedded: ServeProcess, embedded_directory: Path) -> None:
    """The second one says in a sentence who has the directory, and the first one does not notice."""
    result = collab("serve", "--data-dir", str(embedded_directory), "--grpc-address", "127.0.0.1:0")
    assert_one_sentence(result, str(embedded_directory), f"process {embedded.process.pid}", "--data-dir")
    assert result.stderr.count("\n") == 1
    with grpc.insecure_channel(embedded.grpc_address) as channel:
        assert new_session(CollabServiceStub(channel)) > 0


def test_a_port_in_use_is_told(embedded: ServeProcess, directory: Path) -> None:
    """A port that somebody else listens on is a sentence, and the PostgreSQL just started is stopped again."""
    data = directory / "data"
    result = collab("serve", "--data-dir", str(data), "--grpc-address", embedded.grpc_address)
    assert_one_sentence(result, embedded.grpc_address, "in use", "--grpc-address")
    assert "postgres stopped" in result.stderr
    assert (data / "postgres" / "PG_VERSION").exists()
    assert not (data / "postgres" / "postmaster.pid").exists()
    assert_discreet(result.stderr, (data / "password").read_text())


def test_an_address_of_another_machine_is_told(database_url: str) -> None:
    """An address that is not this machine's is a sentence too (192.0.2.1 is for documentation, RFC 5737)."""
    address = "192.0.2.1:50051"
    arguments = ("--database-url", database_url, "--grpc-address", address, "--allow-unauthenticated")
    assert_one_sentence(collab("serve", *arguments), address, "not an address of this machine")


@pytest.mark.parametrize(
    ("option", "address"),
    [("--grpc-address", "0.0.0.0:50051"), ("--grpc-address", "db.internal:50051"), ("--http-address", "[::]:8080")],
)
def test_only_loopback_without_authentication(option: str, address: str, directory: Path) -> None:
    """What other machines can reach is refused before anything starts, with what to do about it."""
    result = collab("serve", "--data-dir", str(directory / "data"), option, address)
    assert_one_sentence(result, option, address, "no authentication", "--allow-unauthenticated", status=2)
    assert result.stderr.count("\n") == 1
    assert not (directory / "data").exists()


@pytest.mark.parametrize(("option", "address"), [("--grpc-address", "127.0.0.1:65536"), ("--http-address", "nonsense")])
def test_bad_addresses_are_told(option: str, address: str, directory: Path) -> None:
    """What is no address is a sentence that shows one."""
    result = collab("serve", "--data-dir", str(directory / "data"), option, address)
    assert_one_sentence(result, option, address, "127.0.0.1:50051", status=2)
    assert not (directory / "data").exists()


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_bad_database_url_is_told(command: str) -> None:
    """What is no PostgreSQL URL is a sentence that shows one, and never what was given: it may hold a password."""
    result = collab(command, COLLAB_DATABASE_URL="mysql://collab:sEcret@db.internal/collab")
    assert_one_sentence(result, "postgresql://user:password@host:5432/database", status=2)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "parameter", ["connect_timeout=x", "sslmode=x", "target_session_attrs=x", "keepalives_idle=x", "service=x"]
)
def test_a_wrong_parameter_of_the_database_is_told(parameter: str) -> None:
    """What no waiting mends is not waited for: the sentence names the parameter, and never the URL."""
    result = collab("serve", COLLAB_DATABASE_URL=f"postgresql://collab:sEcret@127.0.0.1:1/collab?{parameter}")
    assert_one_sentence(result, parameter.partition("=")[0], status=2)


@pytest.mark.parametrize(
    ("option", "word"),
    [("work_mem=x", "work_mem"), ("no_such=1", "no_such"), ("work_mem=4MB -x", "-x")],
)
def test_a_wrong_setting_of_the_server_is_told(cluster: Cluster, option: str, word: str) -> None:
    """The server's own settings in the URL as well."""
    url = f"{cluster.url}&options={quote('-c ' + option)}"
    assert_one_sentence(collab("serve", "--database-url", url), word, status=2)


def test_migrate_without_a_database_is_told() -> None:
    """`collab migrate` says which option it misses."""
    assert_one_sentence(collab("migrate"), "--database-url", "COLLAB_DATABASE_URL", status=2)


def test_migrate_tells_why_it_cannot(cluster: Cluster, directory: Path) -> None:
    """A database that is not there, or does not let us in, is a sentence with the database's own words."""
    missing = f"postgresql://collab:sEcret@/collab?host={directory}"
    assert_one_sentence(collab("migrate", "--database-url", missing), "could not be migrated", "No such file")
    wrong = cluster.url.replace(password_of(cluster.url), "sEcret")
    assert_one_sentence(collab("migrate", "--database-url", wrong), "password authentication failed")


def test_migrate_tells_that_it_may_not(cluster: Cluster) -> None:
    """A role that may not make tables, as PostgreSQL's default has it, gets a sentence and no traceback."""
    name = f"may_not_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'sEcret'").format(sql.Identifier(name)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own = database_url_of(cluster, name).partition("@")[2]
    result = collab("migrate", "--database-url", f"postgresql://{name}:sEcret@{own}")
    assert_one_sentence(result, "permission denied for schema public")


def test_a_missing_schema_names_the_command(cluster: Cluster) -> None:
    """A database without our schema is not served, nor changed; the sentence says what to run."""
    name = f"bare_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = database_url_of(cluster, name)
    result = collab("serve", "--database-url", url, "--grpc-address", "127.0.0.1:0")
    assert_one_sentence(result, "collab migrate")
    assert_discreet(result.stderr, password_of(url))
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert tables.fetchone() == (0,)


def test_it_waits_for_the_database(cluster: Cluster, new_database: Callable[[], str], directory: Path) -> None:
    """Started before its database, it says that it waits and why, and serves as soon as the database is there."""
    later = f"later_{uuid.uuid4().hex[:8]}"
    url = database_url_of(cluster, later)
    process = ServeProcess("--database-url", url, cwd=directory)
    waiting = process.wait_for("waiting for the database")
    assert later in waiting["cause"]
    made = str(psycopg.conninfo.conninfo_to_dict(new_database())["dbname"])
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
        connection.execute(rename.format(sql.Identifier(made), sql.Identifier(later)))
    with process, grpc.insecure_channel(process.grpc_address) as channel:
        assert new_session(CollabServiceStub(channel)) == 1
        assert process.stop() == 0
    assert [line["event"] for line in process.lines].count("waiting for the database") == 1
    assert_discreet(process.text(), password_of(url))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits(directory: Path, number: signal.Signals) -> None:
    """Waiting for a database is no reason not to stop."""
    url = f"postgresql://collab:sEcret@/collab?host={directory}"
    process = ServeProcess("--database-url", url, cwd=directory)
    process.wait_for("waiting for the database")
    assert process.stop(number) == 0
    process.__exit__(None, None, None)
    assert_discreet(process.text(), "sEcret")


def test_settings_as_environment_variables(database_url: str, directory: Path) -> None:
    """What an environment variable says counts, and an option counts more."""
    environment = {
        "COLLAB_DATABASE_URL": database_url,
        "COLLAB_GRPC_ADDRESS": "192.0.2.1:1",
        "COLLAB_LOG_FORMAT": "console",
        "COLLAB_MAX_EVENT_BYTES": "10",
        "COLLAB_SHUTDOWN_GRACE": "1.5",
    }
    with ServeProcess(cwd=directory, **environment) as process:  # which gives an address and a log format of its own
        with grpc.insecure_channel(process.grpc_address) as channel:
            stub = CollabServiceStub(channel)
            session_id = new_session(stub)
            append(stub, session_id, '{"a": 123}')
            with pytest.raises(grpc.RpcError, match="10"):
                append(stub, session_id, '{"a": 1234}')
        assert process.stop() == 0
    assert process.wait_for("stopping")["grace_seconds"] == 1.5
    result = collab("serve", COLLAB_GRPC_ADDRESS=environment["COLLAB_GRPC_ADDRESS"])
    assert_one_sentence(result, "--grpc-address 192.0.2.1:1", status=2)


def test_every_option_is_an_environment_variable() -> None:
    """No setting can be given on the command line alone; the variable is the option's name, as the help says."""
    command = typer.main.get_command(app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    options = [parameter for parameter in serve.params if parameter.name != "help"]
    assert len(options) > 10
    for option in options:
        assert option.envvar == "COLLAB_" + option.opts[0].removeprefix("--").replace("-", "_").upper()


def test_json_logs(database_url: str, directory: Path) -> None:
    """For machines: every line a JSON object with a fixed message, a level and a time."""
    with ServeProcess("--database-url", database_url, "--log-format", "auto", cwd=directory) as process:
        with grpc.insecure_channel(process.grpc_address) as channel, pytest.raises(grpc.RpcError):
            CollabServiceStub(channel).GetSession(pb.GetSessionRequest(session_id=1), timeout=_CALL_SECONDS)
        assert process.stop() == 0
    assert len(process.lines) > 2
    for line in process.lines:
        assert {"event", "level", "timestamp"} <= set(line)
        assert "raw" not in line


async def test_console_logs(database_url: str, directory: Path) -> None:
    """For people: readable lines; without colours where there is no terminal."""
    process = ServeProcess("--database-url", database_url, "--log-format", "console", cwd=directory)

    async def serves() -> bool:
        return "serving" in process.text() or process.process.poll() is not None

    await until(serves, "serving")
    assert process.stop() == 0
    process.__exit__(None, None, None)
    assert all(line.get("raw") for line in process.lines)
    assert "grpc_address=127.0.0.1:" in process.text()
    assert "\\u001b" not in process.text()
    assert_discreet(process.text(), password_of(database_url))


async def test_a_killed_postgres_is_started_again(directory: Path) -> None:
    """When the PostgreSQL of our own dies, the service gets it back by itself, and nothing acknowledged is lost."""
    data = directory / "data"
    with (
        ServeProcess("--data-dir", str(data), cwd=directory) as process,
        grpc.insecure_channel(process.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        kept = [append(stub, session_id, f'{{"n":{n}}}').json for n in range(3)]
        os.kill(int((data / "postgres" / "postmaster.pid").read_text().split("\n")[0]), signal.SIGKILL)
        process.wait_for("postgres has died, starting it again")

        async def works() -> bool:
            try:
                append(stub, session_id, '{"again":true}')
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED), error
                return False
            return True

        await until(works, "an append")
        stored = read(stub, session_id)
        assert stored[:3] == kept
        # One whose answer was lost with the connection may be stored as well.
        assert set(stored[3:]) == {'{"again":true}'}
        assert process.process.poll() is None
        assert process.stop() == 0
    assert_discreet(process.text(), (data / "password").read_text())


def test_acknowledged_events_survive_a_kill(directory: Path) -> None:
    """`kill -9` in the middle of appends, then a start on the same directory: all that was acknowledged is there."""
    data = directory / "data"
    acknowledged: list[str] = []
    enough = threading.Event()
    with (
        ServeProcess("--data-dir", str(data), cwd=directory) as process,
        grpc.insecure_channel(process.grpc_address) as channel,
    ):
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)

        def write() -> None:
            with suppress(grpc.RpcError):
                while len(acknowledged) < 100_000:
                    acknowledged.append(append(stub, session_id, f'{{"n":{len(acknowledged)}}}').json)
                    if len(acknowledged) == 50:
                        enough.set()

        writer = threading.Thread(target=write)
        writer.start()
        assert enough.wait(20)
        process.process.kill()
        process.wait()
        writer.join(20)
        assert not writer.is_alive()
    with ServeProcess("--data-dir", str(data), cwd=directory) as process:
        assert process.lines[0]["event"] == "stopping a postgres that was left running"
        with grpc.insecure_channel(process.grpc_address) as channel:
            stored = read(CollabServiceStub(channel), session_id)
        assert stored[: len(acknowledged)] == acknowledged
        assert len(stored) <= len(acknowledged) + 1
        assert process.stop() == 0


def test_a_data_directory_that_cannot_be_used_is_told(directory: Path) -> None:
    """A file where the data directory should be is a sentence."""
    (directory / "file").touch()
    result = collab("serve", "--data-dir", str(directory / "file"), "--grpc-address", "127.0.0.1:0")
    assert_one_sentence(result, str(directory / "file"))


def test_a_data_directory_without_its_password_is_told(directory: Path) -> None:
    """A wrong password is a sentence that says where the right one belongs; a missing one is not made up anew."""
    data = directory / "data"
    with ServeProcess("--data-dir", str(data), cwd=directory) as process:
        assert process.stop() == 0
    password = (data / "password").read_text()
    (data / "password").write_text("sEcret")
    result = collab("serve", "--data-dir", str(data), "--grpc-address", "127.0.0.1:0")
    assert_one_sentence(result, "authentication failed", f"{data}/password")
    assert "postgres stopped" in result.stderr
    (data / "password").unlink()
    assert_one_sentence(collab("serve", "--data-dir", str(data)), f"{data}/password is missing", "backup")
    assert not (data / "password").exists()
    (data / "password").write_text(password)
    with ServeProcess("--data-dir", str(data), cwd=directory) as process:
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("serve", "migrate", "replay", "event logs")),
        (("serve",), ("--data-dir", "--database-url", "COLLAB_DATABASE_URL", "127.0.0.1:50051", "collab migrate")),
        (("migrate",), ("--database-url", "Example", "up to date")),
        (("replay",), ("TRACE", "--target", "COLLAB_TARGET", "Example")),
    ],
)
def test_help_teaches(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    """Every command says what it does, with its options, their variables and an example; `-h` does the same."""
    result = collab(*arguments, "-h" if arguments == ("migrate",) else "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for word in words:
        assert word in " ".join(result.stdout.split())


def test_no_command_is_help() -> None:
    """`collab` alone shows the help, and a wrong option is told without a traceback."""
    assert "Usage" in collab().stdout + collab().stderr
    wrong = collab("serve", "--no-such-option")
    assert wrong.returncode == 2
    assert_discreet(wrong.stderr)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_keeper_of_postgres_that_dies_takes_the_service_down(directory: Path, workers: str) -> None:
    """What nobody does any more must not go unseen: the service stops in order, and says so with its exit status."""
    program = (
        "import collab_service.cli.serving as serving\n"
        "async def die(*_): raise RuntimeError('a fault')\n"
        "serving._keep_running = die\n"
        "from collab_service.cli.main import main\n"
        "main()\n"
    )
    arguments = ("--data-dir", str(directory / "data"), "--grpc-address", "127.0.0.1:0", "--workers", workers)
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, "serve", *arguments],
        capture_output=True, text=True, timeout=60, env=clean_environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "a background task died" in result.stderr
    assert "postgres stopped" in result.stderr.splitlines()[-1]
