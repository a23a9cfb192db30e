"""A primary is lost, or takes no writes any more, and its standby goes on: nothing acknowledged is lost."""

import asyncio
import time
from pathlib import Path

import psycopg

from collab_service.client import CollabClient, NewEvent
from tests.operate.conftest import url_of
from tests.operate.postgres import Postgres
from tests.processes import ServeProcess, collab
from tests.waiting import until

_WRITERS = 4
"""To each session."""
_SECONDS = 10.0
"""In which the service has to have found the new primary; it takes about one."""


class Writers:
    """Writers that append to sessions one event after the other, and remember what was acknowledged."""

    def __init__(self, client: CollabClient, sessions: list[int]) -> None:
        self.acknowledged: dict[int, dict[int, str]] = {session_id: {} for session_id in sessions}
        self.times: list[float] = []
        self._client = client
        self._stopping = False
        names = [(session_id, f"{session_id}-{n}") for session_id in sessions for n in range(_WRITERS)]
        self._tasks = [asyncio.create_task(self._write(*name)) for name in names]

    async def _write(self, session_id: int, name: str) -> None:
        n = 0
        while not self._stopping:
            event = NewEvent.of({"n": n}, actor_id=name, idempotency_key=f"{name}-{n}")
            appended = await self._client.append(session_id, event)
            self.acknowledged[session_id][appended.event.server_seq] = f"{name}-{n}"
            self.times.append(time.monotonic())
            n += 1

    async def more(self, count: int) -> None:
        """Wait until so many more appends are acknowledged, in each session."""
        goal = {session_id: len(of) + count for session_id, of in self.acknowledged.items()}

        async def reached() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return all(len(of) >= goal[session_id] for session_id, of in self.acknowledged.items())

        await until(reached, "appends")

    async def stop(self) -> None:
        """Stop after the append that each is at."""
        self._stopping = True
        await asyncio.gather(*self._tasks)


async def follow(client: CollabClient, session_id: int, seen: dict[int, str]) -> None:
    """Follow a session from its start and note what comes; a number that comes twice is an error."""
    async for event in client.follow(session_id):
        assert event.server_seq == len(seen) + 1
        seen[event.server_seq] = event.idempotency_key or ""


async def test_the_primary_is_killed(pair: tuple[Postgres, Postgres], directory: Path) -> None:
    """Killed while writers write, and its standby promoted: all goes on there by itself, and the log is whole."""
    primary, standby = pair
    with ServeProcess("--database-url", url_of(primary, standby), cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client:
            sessions = [(await client.create_session())[0].id for _ in range(2)]
            seen: dict[int, dict[int, str]] = {session_id: {} for session_id in sessions}
            followers = [asyncio.create_task(follow(client, of, seen[of])) for of in sessions]
            writers = Writers(client, sessions)
            await writers.more(50)
            primary.kill()
            await asyncio.to_thread(standby.promote)
            promoted = time.monotonic()
            await writers.more(50)
            assert min(at for at in writers.times if at > promoted) - promoted < _SECONDS
            await writers.stop()
            for session_id in sessions:
                stored = {event.server_seq: event.idempotency_key async for event in client.read(session_id)}
                assert list(stored) == list(range(1, len(stored) + 1))
                assert len(set(stored.values())) == len(stored)
                assert writers.acknowledged[session_id] == stored

                async def has_seen_all(of: int = session_id, last: int = len(stored)) -> bool:
                    return len(seen[of]) == last

                await until(has_seen_all, "the follower")
                assert seen[session_id] == stored
            for follower in followers:
                follower.cancel()
        for session_id in sessions:

            async def verifies(of: int = session_id) -> bool:  # once health has noticed that the database is back
                return (
                    await asyncio.to_thread(collab, "verify", str(of), "--target", server.grpc_address)
                ).returncode == 0

            await until(verifies, "verify")
        assert server.stop() == 0


async def test_a_server_that_takes_no_writes_is_left(pair: tuple[Postgres, Postgres], directory: Path) -> None:
    """A primary that is set to read only is not ready; once its standby is promoted, the service is only there."""
    primary, standby = pair
    with ServeProcess("--database-url", url_of(primary, standby), cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client:
            session, _ = await client.create_session()
            for n in range(3):
                await client.append(session.id, NewEvent.of({"n": n}))
            async with await psycopg.AsyncConnection.connect(primary.url, autocommit=True) as connection:
                await connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                await connection.execute("SELECT pg_reload_conf()")

                async def is_left() -> bool:
                    cursor = await connection.execute(
                        "SELECT 1 FROM pg_stat_activity WHERE application_name = 'collab-service'"
                    )
                    return await cursor.fetchone() is None

                waiting = asyncio.create_task(client.append(session.id, NewEvent.of({"n": 3})))
                await asyncio.to_thread(server.wait_for, "the database is away")
                assert not await client.is_serving()
                await asyncio.to_thread(standby.promote)
                assert (await waiting).event.server_seq == 4
                await until(client.is_serving, "health")
                await client.create_session()
                await until(is_left, "leaving")
        with psycopg.connect(standby.url) as connection_to_new:
            counted = connection_to_new.execute("SELECT count(*) FROM collab_events").fetchone()
        assert counted == (4,)
        assert server.stop() == 0
