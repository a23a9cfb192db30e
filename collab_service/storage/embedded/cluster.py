"""One PostgreSQL server on a data directory: made, started, watched and stopped."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import structlog

from collab_service.storage.embedded.binaries import POSTGRES_MAJOR, reachable_binaries
from collab_service.storage.embedded.data_directory import SOCKET_NAME, DataDirectory, EmbeddedError

_log = structlog.get_logger(__name__)

_ROLE = "collab"
_DATABASE = "postgres"
_START_SECONDS = 300  # recovery after a crash reads the write-ahead log again
_STOP_SECONDS = 60


class Cluster:
    """A PostgreSQL that only this process's user reaches: one socket, one password, no TCP.

    The calls block; run them in a thread where that matters.
    """

    def __init__(self, data: DataDirectory) -> None:
        """Find the programs; make the cluster when the data directory has none.

        Raises:
            EmbeddedError: There are no programs, or the cluster cannot be made or belongs to another PostgreSQL.
        """
        self._data = data
        self._socket: Path | None = None
        with data.os_errors():
            self._bin = reachable_binaries(data, data.owner)
            self._password = data.password()
            if not (data.cluster / "PG_VERSION").exists():
                self._create()
            elif (found := (data.cluster / "PG_VERSION").read_text().strip()) != str(POSTGRES_MAJOR):
                raise EmbeddedError(
                    f"{data.path} was made by PostgreSQL {found} and this is {POSTGRES_MAJOR}; "
                    f"move the data with pg_dump or pg_upgrade, or choose another --data-dir"
                )

    @property
    def url(self) -> str:
        """The URL to connect to once it runs. Holds the password: not for logs."""
        return f"postgresql://{_ROLE}:{quote(self._password)}@/{_DATABASE}?host={quote(str(self._socket), safe='')}"

    @property
    def bin(self) -> Path:
        """The directory of the PostgreSQL programs in use."""
        return self._bin

    def start(self, *settings: str) -> None:
        """Start the server and wait until it answers; stop one that a killed predecessor has left behind.

        Args:
            settings: PostgreSQL settings, each `name=value`.

        Raises:
            EmbeddedError: It does not start; the message names its log.
        """
        if left := self._left_running():
            _log.warning("stopping a postgres that was left running", data_dir=str(self._data.path))
            self.stop()
        with self._data.os_errors():
            if self._socket is None:
                self._socket = self._data.socket_directory()
            if not left:
                self._clear_away_traces()
            self._data.log.touch(mode=0o600)
            self._data.give_to_owner(self._data.log)
        own = (
            "listen_addresses=",
            "unix_socket_permissions=0700",
            f'unix_socket_directories="{self._socket}"',
        )
        options = shlex.join(f"--{setting}" for setting in (*settings, *own))
        result = self._run(
            "pg_ctl", "start", "--silent", "--wait", f"--timeout={_START_SECONDS}",
            f"--pgdata={self._data.cluster.name}", f"--log={self._data.log.name}", f"--options={options}",
        )  # fmt: skip
        if result.returncode != 0:
            raise EmbeddedError(f"PostgreSQL did not start; its log, {self._data.log}, says why")

    def stop(self) -> None:
        """Stop the server cleanly: transactions in progress are rolled back, nothing committed is lost."""
        self._run(
            "pg_ctl", "stop", "--silent", "--wait", f"--timeout={_STOP_SECONDS}", "--mode=fast",
            f"--pgdata={self._data.cluster.name}",
        )  # fmt: skip
        if self._socket is not None and self._socket.parent != self._data.path:
            shutil.rmtree(self._socket, ignore_errors=True)
            self._socket = None

    def is_running(self) -> bool:
        """Tell whether the server's main process lives."""
        pid = self._server_pid()
        return pid is not None and _exists(pid) and not _is_zombie(pid)

    def _left_running(self) -> bool:
        """Tell whether a server of an earlier start still runs here.

        A process id is used again, in containers very soon: only a process whose working directory is this cluster, as
        PostgreSQL's is, counts. Where there is no /proc, its number has to do.
        """
        pid = self._server_pid()
        if pid is None or not _exists(pid):
            return False
        return not Path("/proc/self").exists() or self._working_directory(pid) == str(self._data.cluster)

    def _clear_away_traces(self) -> None:
        """Remove the lock files of a server that was killed, which PostgreSQL believes when their number is used again.

        The cluster's is left to PostgreSQL where it can judge it, by a process that is no more. (Where it cannot, the
        shared memory of processes that the dead server left behind still keeps a second one out.)
        """
        pid = self._server_pid()
        if pid is None or _exists(pid):
            (self._data.cluster / "postmaster.pid").unlink(missing_ok=True)
        if self._socket is not None:
            (self._socket / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)

    def _working_directory(self, pid: int) -> str | None:
        link = f"/proc/{pid}/cwd"
        try:
            return os.readlink(link)
        except PermissionError:
            # Root in a container mostly lacks the capability to look at another user's process. That user can.
            look = subprocess.run(["readlink", link], capture_output=True, check=False, **self._data.owner.as_this())
            return os.fsdecode(look.stdout.removesuffix(b"\n"))
        except OSError:
            return None

    def _server_pid(self) -> int | None:
        try:
            return abs(int((self._data.cluster / "postmaster.pid").read_text().split("\n", 1)[0]))
        except (FileNotFoundError, ValueError):
            return None

    def _create(self) -> None:
        """Make the cluster beside its place and move it there, so that a half-made one is never taken for whole."""
        unfinished = self._data.path / "postgres.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        self._data.give_to_owner(unfinished)
        with tempfile.NamedTemporaryFile("w", dir=self._data.path, prefix="password-") as password:
            password.write(self._password)
            password.flush()
            self._data.give_to_owner(Path(password.name))
            result = self._run(
                "initdb", f"--pgdata={unfinished}", f"--username={_ROLE}", f"--pwfile={password.name}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8",
            )  # fmt: skip
        if result.returncode != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            cause = re.search(r"(?:error|FATAL):\s+(.+)", result.stdout)
            said = cause[1] if cause else result.stdout.strip()
            raise EmbeddedError(f"PostgreSQL could not make its files in {self._data.path}: {said}")
        unfinished.rename(self._data.cluster)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # pg_ctl's server keeps what it inherits open, so its output goes to a file and never to a pipe that would wait
        # for the server's end.
        with tempfile.TemporaryFile("w+") as output, _in_a_sentence(program):
            result = subprocess.run(
                [str(self._bin / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Paths are given as seen from here: pg_ctl puts them into a shell command, in which a quote or a dollar
                # sign in the way to the data directory would have a meaning.
                cwd=self._data.path,
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                check=False,
                text=True,
                start_new_session=True,  # a Ctrl-C at the terminal is for us to act on
                **self._data.owner.as_this(),
            )
            output.seek(0)
            result.stdout = output.read()
        return result


@contextmanager
def _in_a_sentence(program: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedError(f"cannot run PostgreSQL's {program}: {error.strerror}: {error.filename}") from error


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_zombie(pid: int) -> bool:
    """Tell whether a process has ended and nobody has asked how, as happens where process 1 of a container does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
