"""A database that is away: it is said at once, nobody waits for ever, and everything recovers by itself."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from collab_service.client import CollabClient, NewEvent, ServiceError
from collab_service.storage.embedded import Cluster
from tests.processes import ServeProcess, collab
from tests.proxy import PostgresProxy
from tests.waiting import until

_SOON = 2.0
"""Seconds until health says so."""
_SLACK = 1.0
"""Seconds that a busy machine may add."""


async def health_becomes(client: CollabClient, serving: bool) -> float:
    """Wait until the health service says so, and return after how many seconds it did."""
    begun = time.monotonic()

    async def says() -> bool:
        return await client.is_serving() == serving

    await until(says, f"health with serving={serving}")
    return time.monotonic() - begun


def processes_of(cluster: Cluster) -> list[int]:
    """Return the processes of a PostgreSQL, its main one first."""
    main = main_process(cluster)
    parents = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/stat")}
    return [main, *(pid for pid, path in parents.items() if _parent(path) == main)]


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def main_process(cluster: Cluster) -> int:
    """Return the number of a PostgreSQL's main process."""
    return int((cluster._data.cluster / "postmaster.pid").read_text().split()[0])


def stop(cluster: Cluster) -> None:
    """Stop it as its operator does."""
    cluster.stop()


def kill(cluster: Cluster) -> None:
    """Kill its main process."""
    os.kill(main_process(cluster), signal.SIGKILL)


def freeze(cluster: Cluster) -> None:
    """Stop all of its processes where they are."""
    for pid in processes_of(cluster):
        os.kill(pid, signal.SIGSTOP)


def thaw(cluster: Cluster) -> None:
    """Let them go on."""
    for pid in processes_of(cluster):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("leave", "come_back"), [(stop, Cluster.start), (kill, Cluster.start), (freeze, thaw)], ids=lambda f: f.__name__
)
async def test_health_says_so(
    own_cluster: Cluster,
    directory: Path,
    leave: Callable[[Cluster], None],
    come_back: Callable[[Cluster], None],
) -> None:
    """Stopped, killed or frozen: health says so within two seconds, and as soon that it is back; appends go on."""
    with ServeProcess("--database-url", own_cluster.url, cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client:
            session, _ = await client.create_session()
            await client.append(session.id, NewEvent.of({"n": 1}))
            await asyncio.to_thread(leave, own_cluster)
            assert await health_becomes(client, False) < _SOON + _SLACK
            begun = time.monotonic()
            with pytest.raises(ServiceError):
                await client.append(session.id, NewEvent.of({"n": 2}, idempotency_key="two"), timeout=1)
            assert time.monotonic() - begun < 1 + _SLACK
            await asyncio.to_thread(come_back, own_cluster)
            assert await health_becomes(client, True) < _SOON + _SLACK
            appended = await client.append(session.id, NewEvent.of({"n": 2}, idempotency_key="two"))
            assert appended.event.server_seq == 2


async def test_a_network_that_swallows_everything(database_url: str, directory: Path) -> None:
    """Connections that lead nowhere any more are cut and replaced; an append without a deadline is answered."""
    async with PostgresProxy(database_url) as proxy:
        # The proxy is in this process, so what waits for the server does it in a thread.
        server = ServeProcess("--database-url", proxy.url, cwd=directory)
        await asyncio.to_thread(server.__enter__)
        async with CollabClient(server.grpc_address, timeout=60) as client:
            session, _ = await client.create_session()
            for n in range(3):
                await client.append(session.id, NewEvent.of({"n": n}))
            follower = asyncio.create_task(read_until(client, session.id, 4))
            proxy.fall_silent()
            waiting = asyncio.create_task(client.append(session.id, NewEvent.of({"n": 3})))
            assert await health_becomes(client, False) < _SOON + _SLACK
            begun = time.monotonic()
            with pytest.raises(ServiceError):
                await client.append(session.id, NewEvent.of({}, idempotency_key="late"), timeout=1)
            assert time.monotonic() - begun < 1 + _SLACK
            assert not waiting.done()
            proxy.come_back()
            # One attempt to connect may still wait, five seconds at most.
            assert await health_becomes(client, True) < 5 + _SOON + _SLACK
            assert (await asyncio.wait_for(waiting, 20)).event.server_seq == 4
            assert await asyncio.wait_for(follower, 20) == [1, 2, 3, 4]
        assert await asyncio.to_thread(server.stop) == 0
        server.__exit__(None, None, None)


async def test_a_signal_while_a_silent_database_is_waited_for(database_url: str, directory: Path) -> None:
    """A database that accepts connections and says nothing keeps no server from ending at once."""
    async with PostgresProxy(database_url) as proxy:
        proxy.fall_silent()
        server = ServeProcess("--database-url", proxy.url, cwd=directory)

        async def is_waiting() -> bool:
            return proxy.is_connected()

        await until(is_waiting, "an attempt to connect")
        begun = time.monotonic()
        assert await asyncio.to_thread(server.stop) == 0
        assert time.monotonic() - begun < 1 + _SLACK
        server.__exit__(None, None, None)


async def test_started_before_the_database(own_cluster: Cluster, directory: Path) -> None:
    """It says what it waits for, without the password, and serves as soon as the database is there."""
    url = own_cluster.url
    password = str(conninfo_to_dict(url)["password"])
    own_cluster.stop()
    server = ServeProcess("--database-url", url, cwd=directory)
    waiting = server.wait_for("waiting for the database")
    assert "dbname=postgres" in waiting["database"]
    assert waiting["cause"]
    await asyncio.to_thread(own_cluster.start)
    with server:
        assert server.stop() == 0
    assert password not in server.text()


def test_a_login_that_is_refused(database_url: str) -> None:
    """Time makes no password right: it ends with status 1 and says what to do, without the password."""
    wrong = make_conninfo(database_url, password="sEcret")
    result = collab("serve", "--database-url", wrong, "--grpc-address", "127.0.0.1:0")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("collab: ")
    for words in ("password authentication failed", "--database-url", "COLLAB_DATABASE_URL"):
        assert words in last
    assert "sEcret" not in result.stderr
    assert "Traceback" not in result.stderr


async def read_until(client: CollabClient, session_id: int, last: int) -> list[int]:
    """Follow a session to a number and return the numbers that came."""
    numbers: list[int] = []
    async for event in client.follow(session_id):
        numbers.append(event.server_seq)
        if event.server_seq == last:
            break
    return numbers
