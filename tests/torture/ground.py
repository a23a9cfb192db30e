"""The ground for a run: a PostgreSQL, the service on it, and the wires in between, all of which may be damaged."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory, EmbeddedError
from collab_service.storage.embedded.accounts import postgres_account
from tests.cli.test_workers import children_of, is_running
from tests.processes import ServeProcess
from tests.proxy import PostgresProxy
from tests.tcp import TcpProxy
from tests.waiting import until

WORKERS = 2
_CLOCK = Path(__file__).parent / "clock"
"""Where the clock is that jumps."""
_DISK_MB = 500
_MAX_CONNECTIONS = 60
_PATIENCE = 60.0
"""Seconds for anything to come back."""
_COMMIT_MICROSECONDS = 2_000
"""What a commit takes longer than it would, so that faults find commits under way."""


class DatabaseWire(PostgresProxy):
    """The wire from the service to PostgreSQL; where there is no PostgreSQL, the connection is refused."""

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._accept(reader, writer)
        except OSError:
            writer.close()

    @property
    def is_late(self) -> bool:
        """Whether something is held back that has not come through yet."""
        return self._delayed is not None

    def heal(self) -> None:
        """Cut nothing more, and let through what was held back."""
        self._client_word = self._server_word = None
        if self._delayed is not None:
            with suppress(RuntimeError):  # the server's end may be closed
                self.send_what_is_late()
            self._delayed[1].close()
            self._delayed = None
        self.come_back()


class ClientWire(TcpProxy):
    """The wire from clients to the service."""

    def half_close(self) -> None:
        """Tell the service that the clients will say nothing more; what it says still gets through."""
        for _, to_server in self._connections:
            if to_server.can_write_eof() and not to_server.is_closing():
                to_server.write_eof()


class Service:
    """`collab serve` with several workers, which can be killed and started again on the same port."""

    def __init__(self, database_url: str, directory: Path) -> None:
        """Prepare; `start` starts it."""
        self._database_url = database_url
        self._directory = directory
        self._clock = directory / "clock"
        self.set_clock(0)
        self._process: ServeProcess | None = None
        self._past: list[ServeProcess] = []
        self.address = "127.0.0.1:0"

    @property
    def parent(self) -> int:
        """The pid of the process that watches the workers."""
        assert self._process is not None
        return self._process.process.pid

    @property
    def workers(self) -> list[int]:
        """The pids of the workers that run."""
        return children_of(self.parent)

    async def start(self) -> None:
        """Start it and wait until it serves, again and again: the database may be away, or the port not free yet."""

        async def serves() -> bool:
            arguments = ("--workers", str(WORKERS), "--database-url", self._database_url)
            clock = {"PYTHONPATH": str(_CLOCK), "TORTURE_CLOCK": str(self._clock)}
            process = ServeProcess(*arguments, cwd=self._directory, grpc_address=self.address, **clock)
            try:
                await asyncio.to_thread(process.wait_for, "serving")
            except AssertionError:
                await asyncio.to_thread(_end, process)
                return False
            self._process = process
            self.address = process.grpc_address
            return True

        if self._process is not None:
            self._past.append(self._process)
        await until(serves, "the start of the service", _PATIENCE)

    def set_clock(self, seconds: float) -> None:
        """Let the clock of its processes be so many seconds ahead of the true one, or behind."""
        # Written over in place: whoever reads meanwhile must not find an empty file.
        file = os.open(self._clock, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(file, f"{seconds * 1e9:<31.0f}".encode(), 0)
        finally:
            os.close(file)

    async def kill_parent(self) -> None:
        """Kill the process that watches the workers, and wait until they have noticed and ended."""
        workers = self.workers
        assert self._process is not None
        self._process.process.kill()
        await asyncio.to_thread(_end, self._process)

        async def gone() -> bool:
            return not any(map(is_running, workers))

        try:
            await until(gone, "the end of the workers", _PATIENCE)
        finally:
            for pid in filter(is_running, workers):
                os.kill(pid, signal.SIGKILL)

    async def stop(self) -> int:
        """Stop it in order and return its exit status."""
        assert self._process is not None
        status = await asyncio.to_thread(self._process.stop, seconds=_PATIENCE)
        self._process.__exit__(None, None, None)
        return status

    async def kill(self) -> None:
        """End it whatever state it is in."""
        if self._process is not None and is_running(self.parent):
            for pid in self.workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.process.kill()
            await asyncio.to_thread(_end, self._process)

    def oddities(self) -> list[str]:
        """Return the log lines that no fault explains: what is no log line at all, and errors of its own."""
        processes = [*self._past, *([self._process] if self._process is not None else [])]
        lines = [line for process in processes for line in process.lines]
        return [
            str(line.get("exception") or line["event"])
            for line in lines
            if line.get("raw") or line.get("exception") or line.get("level") == "critical"
        ]


def _end(process: ServeProcess) -> None:
    process.process.kill()
    process.wait()
    process.__exit__(None, None, None)


class Postgres:
    """The PostgreSQL of a run, which can be stopped in all the ways in which one stops."""

    def __init__(self, directory: Path, disk: Path | None) -> None:
        """Make it and start it.

        Args:
            directory: Of the data.
            disk: The file system that it is on, if that is one of its own, which may be filled.
        """
        self.disk = disk
        account = postgres_account()
        assert account is not None
        self._data = DataDirectory(directory, account)
        self._cluster = Cluster(self._data)
        self._start()
        schema.migrate(self.url)

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self._cluster.url

    @property
    def pid(self) -> int:
        """The postmaster's pid."""
        return int((self._data.cluster / "postmaster.pid").read_text().split()[0])

    async def start_if_stopped(self) -> None:
        """Start it again, should it have given up."""
        if not self._cluster.is_running():
            await asyncio.to_thread(self._start)

    async def restart(self, how: signal.Signals) -> None:
        """End it by a signal to the postmaster, SIGKILL also to all its children; then start it again."""
        pid = self.pid
        children = children_of(pid)
        os.kill(pid, how)
        if how is signal.SIGKILL:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, how)

        async def gone() -> bool:
            return not any(map(is_running, (pid, *children)))

        await until(gone, "the end of PostgreSQL", _PATIENCE)
        await asyncio.to_thread(self._start)

    def close(self) -> None:
        """End it; nobody needs the data any more."""
        if self._cluster.is_running():
            os.kill(self.pid, signal.SIGQUIT)
            self._cluster.stop()
        self._data.release()

    def _start(self) -> None:
        try:
            self._cluster.start(
                f"commit_delay={_COMMIT_MICROSECONDS}", "commit_siblings=0", f"max_connections={_MAX_CONNECTIONS}",
                "min_wal_size=32MB", "max_wal_size=64MB",
            )  # fmt: skip
        except EmbeddedError as error:
            error.add_note(self._data.log.read_text()[-4_000:])  # it is taken away with the rest
            raise


class Ground:
    """Everything that a fault can be made to."""

    def __init__(self, postgres: Postgres, wire: DatabaseWire, service: Service, clients: ClientWire) -> None:
        self.postgres = postgres
        self.wire = wire
        self.service = service
        self.clients = clients


def _new_directory() -> Path:
    """Make a directory that PostgreSQL's user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="collab-torture-"))
    directory.chmod(0o711)
    return directory


@contextmanager
def _small_disk(place: Path) -> Iterator[Path | None]:
    """Mount a small file system there, where that is allowed; None where it is not."""
    place.mkdir(mode=0o711)
    options = f"size={_DISK_MB}m,mode=0711"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
    if mount.returncode:
        yield None
    else:
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


@asynccontextmanager
async def ground() -> AsyncIterator[Ground]:
    """Make everything, and take it away in the end."""
    directory = _new_directory()
    with _small_disk(directory / "disk") as disk:
        async with _ground(directory, disk) as place:
            yield place
    shutil.rmtree(directory)


@asynccontextmanager
async def _ground(directory: Path, disk: Path | None) -> AsyncIterator[Ground]:
    postgres = await asyncio.to_thread(Postgres, directory / "disk" / "data", disk)
    try:
        async with DatabaseWire(postgres.url) as wire:
            service = Service(wire.url, directory)
            try:
                await service.start()
                async with ClientWire(service.address) as clients:
                    yield Ground(postgres, wire, service, clients)
            finally:
                await service.kill()
    finally:
        await asyncio.to_thread(postgres.close)
