"""What is planned while a transaction is under way: it is written behind it, whatever becomes of that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from collab_service.log.decide import Appended
from collab_service.log.service import LogService
from collab_service.model import NewEvent
from collab_service.model.errors import ShuttingDown
from tests.log.conftest import StartService
from tests.log.logs import append, let_inserts_go, read_checked, session_with_known_head, stop_inserts
from tests.proxy import INSERTED, PostgresProxy
from tests.waiting import until

_EVENTS = 100
"""Of a batch: enough for the next one to be planned."""
_WAITING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"


class UnderWay:
    """A transaction that cannot go on, of a batch numbered from 0 on, and batches that are planned meanwhile."""

    def __init__(self, rival: psycopg.AsyncConnection, session_id: int, tasks: list["asyncio.Task[Appended]"]) -> None:
        self._rival = rival
        self.session_id = session_id
        self.tasks = tasks
        """The appends: the one that is under way, then the others in order."""

    async def terminate(self) -> None:
        """End the backend that carries it out."""
        await self._rival.execute(f"SELECT pg_terminate_backend(pid) FROM ({_WAITING}) AS waiting")

    async def let_go(self) -> None:
        """Let it go on."""
        await let_inserts_go(self._rival)


@asynccontextmanager
async def under_way(service: LogService, database_url: str) -> AsyncIterator[UnderWay]:
    """Bring a service so far that a transaction is under way and the next one is planned."""
    session_id = await session_with_known_head(service)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as rival:
        await stop_inserts(rival, "NEW.client_seq = 0")
        tasks = [asyncio.create_task(append_numbered(service, session_id, 0))]

        async def is_waiting() -> bool:
            return bool(await (await rival.execute(_WAITING)).fetchall())

        await until(is_waiting, "a transaction that waits")
        tasks += [asyncio.create_task(append_numbered(service, session_id, n)) for n in (1, 2)]

        async def is_planned() -> bool:
            return service._sequencer._plan is not None

        await until(is_planned, "a plan")
        yield UnderWay(rival, session_id, tasks)


async def append_numbered(service: LogService, session_id: int, batch: int) -> Appended:
    """Append a batch whose events are numbered behind those of the batch before."""
    numbers = range(batch * _EVENTS, (batch + 1) * _EVENTS)
    return await append(service, session_id, *(NewEvent(client_seq=n) for n in numbers))


async def numbers_in(service: LogService, session_id: int) -> list[int]:
    """Return how the events of the batches are numbered, in the order in which they are stored."""
    return [e.content.client_seq for e in await read_checked(service, session_id) if e.content.client_seq is not None]


@pytest.mark.parametrize("trouble", ["none", "stored and lost", "terminated"])
async def test_the_order_is_kept(
    proxy: PostgresProxy, start_service: StartService, database_url: str, trouble: str
) -> None:
    """All batches are stored once, in the order in which they came, and acknowledged with their own numbers."""
    service, reader = start_service(proxy.url), start_service()
    async with under_way(service, database_url) as writing:
        if trouble == "stored and lost":
            proxy.cut_before_server_says(INSERTED)
        elif trouble == "terminated":
            await writing.terminate()
        await writing.let_go()
        appended = await asyncio.gather(*writing.tasks)
    assert await numbers_in(reader, writing.session_id) == list(range(3 * _EVENTS))
    assert [a.events[0].server_seq for a in appended] == [3 + n * _EVENTS for n in range(3)]
    assert [e for a in appended for e in a.events] == (await read_checked(reader, writing.session_id))[2:]


async def test_a_caller_who_leaves(start_service: StartService, database_url: str) -> None:
    """What was planned for somebody who has left is not written; the others' is."""
    service = start_service()
    async with under_way(service, database_url) as writing:
        writing.tasks[1].cancel()
        await asyncio.wait(writing.tasks[1:2])
        await writing.let_go()
        await asyncio.gather(writing.tasks[0], writing.tasks[2])
    expected = [*range(_EVENTS), *range(2 * _EVENTS, 3 * _EVENTS)]
    assert await numbers_in(service, writing.session_id) == expected


@pytest.mark.parametrize("grace", [10, 0])
async def test_stopping(start_service: StartService, database_url: str, grace: int) -> None:
    """A stop writes what was planned; where there is no time for that, its callers are told that it is not stored."""
    service, reader = start_service(), start_service()
    async with under_way(service, database_url) as writing:
        stopping = asyncio.create_task(service.stop(grace))
        if grace == 0:
            await stopping
        await writing.let_go()
        results = await asyncio.gather(*writing.tasks, return_exceptions=True)
        await stopping
    if grace:
        assert await numbers_in(reader, writing.session_id) == list(range(3 * _EVENTS))
    else:
        assert [type(result) for result in results[1:]] == [ShuttingDown, ShuttingDown]
        assert set(await numbers_in(reader, writing.session_id)) <= set(range(_EVENTS))
