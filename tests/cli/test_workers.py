"""`collab serve --workers N` as its operators meet it: several processes on one port, and one that watches over them.

Which worker a connection has reached stands in the log, beside each failed call. Processes are looked up in /proc.
"""

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import psycopg
import pytest

from collab_service.cli.main import main
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.test_serve import assert_discreet, password_of
from tests.processes import START_SECONDS, ServeProcess
from tests.rpc.calls import TIMEOUT, Failure, append, events, new_session
from tests.waiting import until

_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Makes a channel share its connection with no other channel of this process."""
_NO_SESSION = 2**62
_INTERPRETER = Path(sys.executable).resolve()


def is_running(pid: int) -> bool:
    """Tell whether a process has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # which has ended, and is only waiting to be asked how


def children_of(parent: int) -> list[int]:
    """Return the processes that a process has started and that run."""
    try:
        pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid for pid in map(int, pids) if is_running(pid)]


@contextmanager
def started(process: ServeProcess) -> Iterator[ServeProcess]:
    """Kill a server with its workers in the end, whatever has become of it; do not wait until it serves."""
    try:
        yield process
    finally:
        pids = children_of(process.process.pid)
        process.process.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.__exit__(None, None, None)


@contextmanager
def orphaned(process: ServeProcess, pids: list[int]) -> Iterator[None]:
    """Kill the parent of these workers; kill them too in the end if they have not ended by themselves."""
    process.process.kill()
    process.process.wait()
    try:
        yield
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


async def ended(pids: list[int]) -> None:
    """Wait until processes have ended by themselves."""

    async def gone() -> bool:
        return not any(map(is_running, pids))

    await until(gone, f"the end of {pids}")


def has_imported_grpc(pid: int) -> bool:
    """Tell whether a process has come to import grpc."""
    return "cygrpc" in Path(f"/proc/{pid}/maps").read_text()


async def children_under_way(process: ServeProcess, count: int) -> list[int]:
    """Wait until a server's workers have read their order and imported everything, which is before they serve."""
    pids: list[int] = []

    async def under_way() -> bool:
        assert process.process.poll() is None, process.text()
        pids[:] = children_of(process.process.pid)
        return len(pids) == count and all(map(has_imported_grpc, pids))

    await until(under_way, "the start of the workers")
    return pids


def worker_of(process: ServeProcess, channel: grpc.Channel) -> int:
    """Return the number of the worker that a channel is connected to."""
    request_id = uuid.uuid4().hex
    with pytest.raises(grpc.RpcError) as failed:
        CollabServiceStub(channel).GetSession(
            pb.GetSessionRequest(session_id=_NO_SESSION), metadata=(("x-request-id", request_id),), timeout=TIMEOUT
        )
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND, failed.value
    return int(process.wait_for("call failed", request_id=request_id)["worker"])


@contextmanager
def connected(process: ServeProcess, workers: int) -> Iterator[dict[int, grpc.Channel]]:
    """Connect until every worker is reached; yield a channel to each, by its number."""
    with ExitStack() as stack:
        channels: dict[int, grpc.Channel] = {}
        for _ in range(200):
            channel = stack.enter_context(grpc.insecure_channel(process.grpc_address, _OWN_CONNECTION))
            channels.setdefault(worker_of(process, channel), channel)
            if len(channels) == workers:
                break
        assert sorted(channels) == list(range(1, workers + 1))
        yield channels


class Writers:
    """Threads that append to a session through the given channels until they are refused."""

    def __init__(self, channels: list[grpc.Channel], session_id: int) -> None:
        self.acknowledged: list[int] = []
        self.failures: list[grpc.RpcError] = []
        self._session_id = session_id
        self._threads = [threading.Thread(target=self._write, args=(channel,)) for channel in channels]
        for thread in self._threads:
            thread.start()

    def _write(self, channel: grpc.Channel) -> None:
        stub = CollabServiceStub(channel)
        try:
            while True:
                self.acknowledged.append(append(stub, self._session_id).event.server_seq)
        except grpc.RpcError as error:
            self.failures.append(error)

    async def under_way(self) -> None:
        """Wait until they have written a little."""

        async def some() -> bool:
            assert not self.failures
            return len(self.acknowledged) > 100

        await until(some, "some appends")

    def join(self) -> None:
        """Wait until all of them have been refused."""
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()


def follow(channel: grpc.Channel, session_id: int) -> Iterator[pb.ListEventsResponse]:
    """Follow a session, and return once that has begun."""
    messages = CollabServiceStub(channel).ListEvents(pb.ListEventsRequest(session_id=session_id, follow=True))
    next(messages)
    return messages


def reason_of_end(messages: Iterator[pb.ListEventsResponse]) -> str:
    """Read a stream to its end, which has to be an error, and return the reason."""
    with pytest.raises(grpc.RpcError) as end:
        for _ in messages:
            pass
    return Failure(end.value).reason


def stored_numbers(database_url: str, session_id: int) -> list[int]:
    """Return the numbers of a session's events, as the database has them."""
    with psycopg.connect(database_url) as connection:
        select = "SELECT server_seq FROM collab_events WHERE session_id = %s ORDER BY server_seq"
        return [number for (number,) in connection.execute(select, (session_id,))]


@pytest.fixture(scope="module")
def workers(server_database_url: str, run_directory: Path) -> Iterator[ServeProcess]:
    """Three processes on one port, for tests that leave them running."""
    with started(ServeProcess("--database-url", server_database_url, "--workers", "3", cwd=run_directory)) as process:
        process.wait_for("serving")
        yield process


def test_several_processes_serve_on_one_port(workers: ServeProcess) -> None:
    """Each says that it serves, then the first one that all do; connections reach every one of them."""
    lines = [line for line in workers.lines if line["event"] in ("worker serving", "serving")]
    assert sorted(line.get("worker", 0) for line in lines[:-1]) == [1, 2, 3]
    assert lines[-1]["workers"] == 3
    assert len({line["grpc_address"] for line in lines}) == 1
    pids = children_of(workers.process.pid)
    assert len(pids) == 3
    assert os.getpgid(workers.process.pid) not in map(os.getpgid, pids)  # to whom a terminal sends Ctrl-C
    with connected(workers, 3) as channels:
        assert {worker_of(workers, channel) for channel in channels.values()} == {1, 2, 3}


def test_appends_through_all_give_numbers_without_a_gap(workers: ServeProcess) -> None:
    """All workers write to one session at once: each number is given once, none is left out, and all read the same."""
    with connected(workers, 3) as channels:
        session_id = new_session(CollabServiceStub(channels[1]))
        numbers: list[int] = []

        def write(channel: grpc.Channel) -> None:
            for _ in range(40):
                numbers.append(append(CollabServiceStub(channel), session_id).event.server_seq)

        writers = [threading.Thread(target=write, args=(channel,)) for channel in (*channels.values(),) * 2]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(TIMEOUT)
        assert sorted(numbers) == list(range(1, 241))
        for channel in channels.values():
            assert [event.server_seq for event in events(CollabServiceStub(channel), session_id)] == sorted(numbers)


async def test_a_worker_that_is_killed_is_started_again(workers: ServeProcess) -> None:
    """The others go on as if nothing had been, and soon there are as many as before, on the same port."""
    with connected(workers, 3) as channels:
        session_id = new_session(CollabServiceStub(channels[1]))
        before = children_of(workers.process.pid)
        os.kill(before[0], signal.SIGKILL)
        number = workers.wait_for("a worker has ended, starting another", status=-signal.SIGKILL)["number"]
        others = [CollabServiceStub(channel) for worker, channel in channels.items() if worker != number]
        writes = [append(stub, session_id).event.server_seq for stub in others]

        async def serves_again() -> bool:
            writes.extend(append(stub, session_id).event.server_seq for stub in others)
            said = [line for line in workers.lines if line["event"] == "worker serving" and line["worker"] == number]
            return len(said) == 2

        await until(serves_again, "the worker's return")
        assert writes == list(range(1, len(writes) + 1))
    after = children_of(workers.process.pid)
    assert len(after) == 3
    assert len({*before} & {*after}) == 2
    with connected(workers, 3) as channels:
        for channel in channels.values():
            writes.append(append(CollabServiceStub(channel), session_id).event.server_seq)
        assert writes == list(range(1, len(writes) + 1))
    assert [line["event"] for line in workers.lines].count("serving") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_in_the_middle_of_writing(database_url: str, directory: Path, number: signal.Signals) -> None:
    """Status 0, no process left, follows ended with a reason, and exactly what was acknowledged is stored."""
    with ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory) as process:
        pids = children_of(process.process.pid)
        with connected(process, 2) as channels:
            session_id = new_session(CollabServiceStub(channels[1]))
            follows = [follow(channel, session_id) for channel in channels.values()]
            writers = Writers([*channels.values()] * 4, session_id)
            await writers.under_way()
            assert process.stop(number) == 0
            assert not any(map(is_running, pids))
            writers.join()
            assert {Failure(failure).reason for failure in writers.failures} == {"SHUTTING_DOWN"}
            assert {reason_of_end(messages) for messages in follows} == {"SHUTTING_DOWN"}
    stored = stored_numbers(database_url, session_id)
    assert stored == list(range(1, len(stored) + 1))
    assert sorted(writers.acknowledged) == stored
    assert [line["event"] for line in process.lines if "worker" not in line] == ["serving", "stopping", "stopped"]
    assert [line["event"] for line in process.lines].count("stopped") == 3
    assert_discreet(process.text(), password_of(database_url))
    assert os.listdir(directory) == []


async def test_a_second_signal_stops_at_once(database_url: str, directory: Path) -> None:
    """SIGTERM waits for a call that hangs, here for a row that somebody has locked; a second one does not."""
    arguments = ("--workers", "2", "--shutdown-grace", "60")
    with (
        ServeProcess("--database-url", database_url, *arguments, cwd=directory) as process,
        grpc.insecure_channel(process.grpc_address) as channel,
        psycopg.connect(database_url) as locker,
        psycopg.connect(database_url, autocommit=True) as watcher,
    ):
        pids = children_of(process.process.pid)
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        locker.execute("SELECT FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        call = stub.AppendEvent.future(pb.AppendEventRequest(session_id=session_id, event=pb.NewEvent()))

        async def hangs() -> bool:
            waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            return watcher.execute(waiting).fetchone() is not None

        await until(hangs, "the append's wait for the lock")
        process.send(signal.SIGTERM)
        for worker in (1, 2):
            process.wait_for("stopping", worker=worker, grace_seconds=60.0)
        assert process.process.poll() is None
        assert not call.done()
        again = time.monotonic()
        assert process.stop(signal.SIGTERM) == 0
        assert time.monotonic() - again < 5
        assert not any(map(is_running, pids))
        assert call.exception(TIMEOUT) is not None
    process.wait_for("stopping at once, as the second signal says")
    assert_discreet(process.text(), password_of(database_url))


async def test_workers_end_with_their_parent(directory: Path) -> None:
    """`kill -9` of the parent: the workers end by themselves, as after SIGTERM, and leave the port free.

    The next start, on the same port and the PostgreSQL that was left behind, has all there was.
    """
    arguments = ("--data-dir", str(directory / "data"), "--workers", "2")
    with started(ServeProcess(*arguments, cwd=directory)) as process:
        address = process.grpc_address
        pids = children_of(process.process.pid)
        assert len(pids) == 2
        with connected(process, 2) as channels:
            session_id = new_session(CollabServiceStub(channels[1]))
            messages = follow(channels[2], session_id)
            writers = Writers([*channels.values()] * 2, session_id)
            await writers.under_way()
            with orphaned(process, pids):
                await ended(pids)
            writers.join()
            assert {Failure(failure).reason for failure in writers.failures} == {"SHUTTING_DOWN"}
            assert reason_of_end(messages) == "SHUTTING_DOWN"
    assert [line["event"] for line in process.lines].count("the parent process is gone") == 2
    assert_discreet(process.text(), (directory / "data" / "password").read_text())
    with ServeProcess(*arguments, "--shutdown-grace", "0", cwd=directory, grpc_address=address) as process:
        assert process.lines[0]["event"] == "stopping a postgres that was left running"
        assert process.grpc_address == address
        with connected(process, 2) as channels:
            for channel in channels.values():
                stored = [event.server_seq for event in events(CollabServiceStub(channel), session_id)]
                assert stored == sorted(writers.acknowledged)
            assert append(CollabServiceStub(channels[2]), session_id).event.server_seq == len(stored) + 1
        assert process.stop() == 0
    assert not (directory / "data" / "postgres" / "postmaster.pid").exists()


async def test_workers_end_with_their_parent_while_they_start(database_url: str, directory: Path) -> None:
    """The same before they have come to serve: nobody hears that they do, and they end with no word but the log's."""
    with started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process:
        pids = await children_under_way(process, 2)
        with orphaned(process, pids):
            await ended(pids)
    assert not [line for line in process.lines if line.get("raw")]
    assert_discreet(process.text(), password_of(database_url))


@contextmanager
def stranger() -> Iterator[int]:
    """Listen on 127.0.0.1, ready to share the port with others who are; yield the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def assert_refused(process: ServeProcess, address: str) -> list[str]:
    """Assert that a server ends with status 1 and a sentence that says why; return what it has said before."""
    assert process.wait(START_SECONDS) == 1
    *before, last = (line["event"] for line in process.lines)
    assert last.startswith(f"collab: cannot listen on {address}: it is in use")
    assert_discreet(process.text())
    return before


def test_a_port_is_not_shared_with_strangers(database_url: str, directory: Path) -> None:
    """A port that somebody else listens on is refused, also when they would share it; no worker is started first."""
    with stranger() as port, ExitStack() as stack:
        address = f"127.0.0.1:{port}"
        one, two = (
            stack.enter_context(
                started(
                    ServeProcess(
                        "--database-url", database_url, "--workers", count, cwd=directory, grpc_address=address
                    )
                )
            )
            for count in ("1", "2")
        )
        assert "serving" not in assert_refused(one, address)
        assert assert_refused(two, address) == []


def test_one_of_two_addresses_is_not_enough(database_url: str, directory: Path) -> None:
    """`localhost` is 127.0.0.1 and ::1 for gRPC. Where one is somebody else's, clients may arrive there: refused."""
    with (
        stranger() as port,
        started(
            ServeProcess("--database-url", database_url, cwd=directory, grpc_address=f"localhost:{port}")
        ) as process,
    ):
        assert_refused(process, f"localhost:{port}")


def test_a_port_whose_connections_linger_is_free(database_url: str, directory: Path) -> None:
    """A connection that the server before, a lone process, has closed keeps the port from nobody (TIME_WAIT)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname()) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
    arguments = ("--database-url", database_url, "--workers", "2")
    with started(ServeProcess(*arguments, cwd=directory, grpc_address=address)) as process:
        assert process.grpc_address == address


async def test_a_worker_that_never_serves_ends_it_all(database_url: str, directory: Path) -> None:
    """One that dies before it has ever served is not started for ever: status 1, no traceback, no process left."""
    with started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process:
        pids = await children_under_way(process, 2)
        os.kill(pids[0], signal.SIGKILL)
        assert process.wait(START_SECONDS) == 1
        assert not any(map(is_running, pids))
    assert "serving" not in [line["event"] for line in process.lines]
    assert_discreet(process.text(), password_of(database_url))


async def test_a_worker_that_dies_at_once_ends_it_all(database_url: str, directory: Path) -> None:
    """The same where it has not even been told yet what to do."""
    with started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process:
        while not (pids := children_of(process.process.pid)):
            assert process.process.poll() is None, process.text()
        process.send(signal.SIGSTOP)  # so that it finds the worker dead whatever it does next
        os.kill(pids[0], signal.SIGKILL)
        await ended(pids[:1])
        process.send(signal.SIGCONT)
        assert process.wait(5) == 1
    assert_discreet(process.text(), password_of(database_url))


async def test_a_worker_that_cannot_be_started_is_tried_again(
    database_url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as while an upgrade has taken the interpreter away: the others go on, and it is there when it can be."""
    python = directory / "python"
    python.symlink_to(_INTERPRETER)
    monkeypatch.setattr("tests.processes.COLLAB", [str(python), "-m", "collab_service"])
    arguments = ("--database-url", database_url, "--workers", "2")
    with started(ServeProcess(*arguments, cwd=directory, PYTHONPATH=os.pathsep.join(sys.path))) as process:
        with connected(process, 2) as channels:
            python.rename(directory / "away")
            os.kill(children_of(process.process.pid)[0], signal.SIGKILL)
            ended = process.wait_for("a worker has ended, starting another")

            async def tried() -> bool:
                return process.lines[-1] is not ended

            await until(tried, "a word on why it cannot be started")
            assert_discreet(process.text(), password_of(database_url))
            (other,) = (channel for worker, channel in channels.items() if worker != ended["number"])
            assert new_session(CollabServiceStub(other)) > 0
        (directory / "away").rename(python)

        async def serves_again() -> bool:
            return [line["event"] for line in process.lines].count("worker serving") == 3

        await until(serves_again, "the worker's return")


def test_workers_import_nothing_from_the_working_directory(
    database_url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command `collab` itself, which may be started anywhere."""
    (directory / "structlog.py").write_text("raise SystemExit('imported from the working directory')\n")
    monkeypatch.setattr("tests.processes.COLLAB", [str(Path(sys.executable).with_name("collab"))])
    with started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process:
        assert process.wait_for("serving")["workers"] == 2


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", "257", "", "²"])
def test_bad_numbers_of_workers_are_told(
    count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no possible number of workers is a sentence with what is, before anything else is looked at."""
    monkeypatch.setattr(sys, "argv", ["collab", "serve", "--database-url", "none", "--workers", count])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"collab: --workers {count} is not possible")
    assert output.err.count("\n") == 1
    assert "1 to 256" in output.err
    assert "auto" in output.err


def test_a_worker_for_each_core(database_url: str, directory: Path) -> None:
    """`auto` is as many as there are cores that the process may use; a lone one is the process itself."""
    usable = os.sched_getaffinity(0)
    every = ServeProcess("--database-url", database_url, "--workers", "auto", cwd=directory)
    with started(every):
        os.sched_setaffinity(0, {min(usable)})
        try:
            one = ServeProcess("--database-url", database_url, cwd=directory, COLLAB_WORKERS="auto")
        finally:
            os.sched_setaffinity(0, usable)
        with started(one):
            assert "workers" not in one.wait_for("serving")
            assert children_of(one.process.pid) == []
        count = len(usable)
        assert every.wait_for("serving").get("workers") == (count if count > 1 else None)
        assert len(children_of(every.process.pid)) == (count if count > 1 else 0)
