"""Following without gRPC: what happens when notifications, connections, the database or readers fail."""

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import psycopg
import pytest

from collab_service.log import follow
from collab_service.log.reading import Page, Reader
from collab_service.log.service import LogService
from collab_service.log.tail import Tail
from collab_service.log.tails import Tails
from collab_service.metrics import FollowMetrics
from collab_service.model import NewEvent
from collab_service.model.errors import (
    CollabError,
    ServerSeqBeyondHead,
    SessionNotFound,
    ShuttingDown,
    StorageUnavailable,
    TooManyFollowers,
)
from collab_service.storage.database import Database
from collab_service.storage.embedded import Cluster
from tests.log.conftest import StartService
from tests.log.logs import append, new_session, read_checked, unseen
from tests.proxy import COMMITTED, PostgresProxy
from tests.waiting import until

SMALL = NewEvent(payload='{"a":1}')


class Follower:
    """Somebody who follows: as fast as it can, or only the first page until `reading` is set."""

    def __init__(
        self,
        service: LogService,
        session_id: int,
        since: int = 0,
        types: tuple[str, ...] = (),
        *,
        first_page_only: bool = False,
    ) -> None:
        self.pages: list[Page] = []
        self.error: BaseException | None = None
        self.reading = asyncio.Event()
        if not first_page_only:
            self.reading.set()
        self._pages = service.follow(session_id, since=since, limit=0, types=types)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async with aclosing(self._pages):
                async for page in self._pages:
                    self.pages.append(page)
                    await self.reading.wait()
        except CollabError as error:
            self.error = error

    @property
    def numbers(self) -> list[int]:
        """The number of every event that came."""
        return [event.server_seq for page in self.pages for event in page.events]

    async def until(self, holds: Callable[["Follower"], bool], seconds: float = 20) -> None:
        """Wait until a condition holds."""

        async def held() -> bool:
            return holds(self)

        await until(held, "what a follower waits for", seconds)

    async def until_through(self, number: int, seconds: float = 20) -> None:
        """Wait for a bookmark."""
        await self.until(lambda follower: bool(follower.pages) and follower.pages[-1].through >= number, seconds)

    async def leave(self) -> None:
        """Stop following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def following(
    service: LogService,
    session_id: int,
    since: int = 0,
    types: tuple[str, ...] = (),
    *,
    first_page_only: bool = False,
) -> AsyncIterator[Follower]:
    """Follow a session for the length of the block."""
    follower = Follower(service, session_id, since, types, first_page_only=first_page_only)
    try:
        yield follower
    finally:
        await follower.leave()


async def kill_listeners(database_url: str) -> int:
    """Kill the connections that listen in a database; return how many there were."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'LISTEN%' AND pid <> pg_backend_pid()"
        )
        return len(await cursor.fetchall())


async def test_a_commit_in_doubt_whose_caller_has_left(
    no_poll: None, proxy: PostgresProxy, start_service: StartService
) -> None:
    """Also an event whose caller had left before it was found to be stored reaches those who follow, in its place."""
    service = start_service(proxy.url)
    session_id = await new_session(service)
    await append(service, session_id, SMALL)
    async with following(service, session_id) as follower:
        await follower.until_through(1)
        proxy.cut_before_server_says(COMMITTED, stay_away=True)
        tasks = [asyncio.create_task(append(service, session_id, SMALL)) for _ in range(3)]

        async def is_cut() -> bool:
            return proxy.cuts == 1

        await until(is_cut, "the cut")
        tasks[1].cancel()
        await asyncio.wait(tasks[1:2])
        proxy.come_back()
        assert [(await task).events[0].server_seq for task in (tasks[0], tasks[2])] == [2, 4]
        await append(service, session_id, SMALL)
        await follower.until_through(5)
        assert follower.numbers == [1, 2, 3, 4, 5]


async def test_another_process_delivers_at_once(start_service: StartService) -> None:
    """An append through one process reaches followers of another long before they look for themselves."""
    here, there = start_service(), start_service()
    session = await new_session(here)
    async with following(there, session) as follower:
        await follower.until_through(0)
        await append(here, session, SMALL)  # the listener may only be connecting
        await follower.until_through(1)
        for n in range(2, 12):
            await append(here, session, SMALL)
            await follower.until_through(n, seconds=1.5)


async def test_the_listener_is_killed_again_and_again(start_service: StartService, database_url: str) -> None:
    """Followers miss nothing while the connections that listen are killed under load; notifications come back."""
    here, there = start_service(), start_service()
    session = await new_session(here)
    killed = 0
    async with following(there, session) as follower, following(here, session) as own:
        for n in range(300):
            await append(here if n % 2 else there, session, *[SMALL] * (1 + n % 3))
            if n % 25 == 0:
                killed += await kill_listeners(database_url)
        log = await read_checked(here, session)
        for each in (follower, own):
            await each.until_through(len(log))
            assert each.numbers == list(range(1, len(log) + 1))
    assert killed > 2


async def test_without_notifications(start_service: StartService) -> None:
    """With NOTIFY switched off altogether everything comes, only later."""
    here, there = start_service(notify=False), start_service(notify=False)
    session = await new_session(here)
    async with following(there, session) as follower, following(here, session) as own:
        await follower.until_through(0)
        for _ in range(50):
            await append(here, session, SMALL)
        await own.until_through(50, seconds=1)
        await follower.until_through(50, seconds=5)
        await append(there, session, SMALL)
        await follower.until_through(51, seconds=1)
        for each in (follower, own):
            await each.until_through(51, seconds=5)
            assert each.numbers == list(range(1, 52))


async def test_a_busy_session_keeps_no_other_from_being_looked_at(service: LogService, database_url: str) -> None:
    """However often it is told to look at one session, what was missed of another is found in time."""
    busy, quiet = await new_session(service), await new_session(service)
    metrics = unseen()
    database = Database(database_url, metrics=metrics.database.pool("tails"))
    reader = Reader(database, metrics=metrics.reads.of("tails"), at_once=2)
    tails = Tails(reader, metrics=metrics.follows, max_followers=2)

    async def tell_again_and_again() -> None:
        while True:
            tails.look_at([busy])
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(tails.run()), asyncio.create_task(tell_again_and_again())]
    try:
        with tails.join(busy) as one, tails.join(quiet) as other:
            tails.learn(one, 0)
            tails.learn(other, 0)
            await append(service, quiet, SMALL)
            await asyncio.wait_for(other.turn(0, 60), 6)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await database.dispose()


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody look for what is new unless there is a reason to."""
    monkeypatch.setattr("collab_service.log.tails.POLL", 60.0)


async def test_a_new_listener_wakes_everyone(
    no_poll: None, start_service: StartService, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others wrote while nobody listened comes as soon as somebody listens again."""
    monkeypatch.setattr("collab_service.log.notifications._FIRST_PAUSE", 0.5)
    here, there = start_service(), start_service()
    session = await new_session(here)
    async with following(there, session) as follower:
        await follower.until_through(0)
        await append(here, session, SMALL)
        await follower.until_through(1)
        assert await kill_listeners(database_url) == 1
        await append(here, session, SMALL)
        await follower.until_through(2, seconds=3)


async def test_a_number_that_does_not_continue(no_poll: None, start_service: StartService) -> None:
    """A gap before what this process wrote, or a head that a new follower finds, shows what others wrote: all of it."""
    here, there = start_service(notify=False), start_service(notify=False)
    session = await new_session(here)
    async with following(there, session) as first:
        await first.until_through(0)
        await append(here, session, *[SMALL] * 1_000)
        await append(here, session, *[SMALL] * 500)
        await append(there, session, SMALL)
        await first.until_through(1_501, seconds=2)
        await append(here, session, SMALL)
        async with following(there, session, 1_501) as second:
            await second.until_through(1_502, seconds=2)
            assert second.numbers == [1_502]
        await first.until_through(1_502, seconds=2)
        assert first.numbers == list(range(1, 1_503))


async def test_the_last_words_of_a_process(no_poll: None, start_service: StartService) -> None:
    """What a process wrote just before it stopped is told to the others."""
    here, there = start_service(), start_service()
    session = await new_session(here)
    async with following(there, session) as follower:
        await follower.until_through(0)
        await append(here, session, SMALL)
        await follower.until_through(1)
        for _ in range(3):
            await append(here, session, SMALL)
        await here.stop(5)
        await follower.until_through(4, seconds=2)


async def test_a_strange_notification(no_poll: None, start_service: StartService, database_url: str) -> None:
    """Whatever else is said on the channel is taken as a reason to look."""
    here, there = start_service(notify=False), start_service()
    session = await new_session(here)
    async with (
        following(there, session) as follower,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
    ):
        await follower.until_through(0)
        await append(here, session, SMALL)
        for number, words in enumerate(("", "nonsense", "-1", "9" * 30, str(session)), start=1):
            await connection.execute("SELECT pg_notify('collab_sessions', %s)", (words,))
            if words in ("nonsense", str(session)):
                await follower.until_through(number // 5 + 1, seconds=3)
                await append(here, session, SMALL)


async def test_a_queue_of_notifications_that_is_full(own_cluster: Cluster, start_service: StartService) -> None:
    """A listener of somebody else's that never reads fills the server's queue: that costs time, and nothing more."""
    own_cluster.stop()
    own_cluster.start("max_notify_queue_pages=64")
    here, there = start_service(own_cluster.url), start_service(own_cluster.url)
    session = await new_session(here)
    async with (
        await psycopg.AsyncConnection.connect(own_cluster.url) as sleeper,
        await psycopg.AsyncConnection.connect(own_cluster.url, autocommit=True) as filler,
        following(there, session) as follower,
        following(here, session) as own,
    ):
        await sleeper.execute("LISTEN anything")
        await sleeper.commit()
        await sleeper.execute("SELECT 1")  # and stays in a transaction
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            for _ in range(200):
                await filler.execute("SELECT pg_notify('anything', repeat('x', 7000) || random())")
        for _ in range(3):
            await append(here, session, SMALL)
        await own.until_through(3, seconds=1)
        await follower.until_through(3, seconds=6)
        await sleeper.rollback()


async def test_a_table_that_cannot_be_read_for_a_while(
    start_service: StartService, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a read hangs there are a first message, heartbeats, and an end when the service stops."""
    monkeypatch.setattr(follow, "HEARTBEAT", 0.2)
    monkeypatch.setattr(follow, "_BOOKMARKS", 0.2)
    service = start_service()
    session = await new_session(service)
    await append(service, session, *[SMALL] * 1_200)
    async with following(service, session, first_page_only=True) as catching_up:
        await catching_up.until(lambda follower: bool(follower.pages))
        async with await psycopg.AsyncConnection.connect(database_url) as holder:
            await holder.execute("LOCK TABLE collab_events IN ACCESS EXCLUSIVE MODE")
            catching_up.reading.set()
            await catching_up.until(lambda follower: len(follower.pages) >= 4)
            assert catching_up.pages[-1].through < catching_up.pages[-1].head == 1_200
            assert catching_up.numbers == list(range(1, len(catching_up.numbers) + 1))
            await holder.rollback()
        await catching_up.until_through(1_200)
        assert catching_up.numbers == list(range(1, 1_201))
        async with await psycopg.AsyncConnection.connect(database_url) as holder:
            await holder.execute("LOCK TABLE collab_events IN ACCESS EXCLUSIVE MODE")
            async with following(service, session) as late:
                await asyncio.sleep(0.1)  # it looks for the head, which hangs
                service.stop_following()
                for each in (late, catching_up):
                    await each.until(lambda follower: isinstance(follower.error, ShuttingDown), seconds=2)


async def test_a_database_that_hangs(
    own_cluster: Cluster, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that neither answers nor goes away is as good as away: heartbeats, then an error."""
    monkeypatch.setattr("collab_service.log.tails.PATIENCE", 1.0)
    monkeypatch.setattr(follow, "HEARTBEAT", 0.2)
    service = start_service(own_cluster.url)
    session = await new_session(service)
    async with following(service, session) as follower:
        await follower.until_through(0)
        async with await psycopg.AsyncConnection.connect(own_cluster.url, autocommit=True) as connection:

            async def backends(where: str) -> list[int]:
                cursor = await connection.execute(
                    f"SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND {where}"
                )
                return [row[0] for row in await cursor.fetchall()]

            async def has_looked() -> bool:
                return len(await backends("query LIKE '%collab_sessions s WHERE s.id = ANY%'")) == 2

            await until(has_looked, "a look at the followed sessions")
            pids = await backends("backend_type = 'client backend'")
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            beats = len(follower.pages)
            await follower.until(lambda follower: isinstance(follower.error, StorageUnavailable), seconds=10)
            assert len(follower.pages) > beats + 2
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


async def test_a_pool_that_is_busy_with_others(start_service: StartService, database_url: str) -> None:
    """Followers are served while every other connection of the process waits for something."""
    here, there = start_service(), start_service(database_pool_size=2)
    session, stuck = await new_session(here), await new_session(here)
    async with following(there, session) as follower:
        await follower.until_through(0)
        async with await psycopg.AsyncConnection.connect(database_url) as holder:
            await holder.execute("SELECT 1 FROM collab_sessions WHERE id = %s FOR UPDATE", (stuck,))
            touches = [asyncio.create_task(there.touch_session(stuck)) for _ in range(4)]
            await append(here, session, SMALL)
            await follower.until_through(1, seconds=5)
            await holder.rollback()
        await asyncio.gather(*touches)


async def test_deleted_through_another_process_without_notifications(start_service: StartService) -> None:
    """A deleted session ends its follows also where nobody has told."""
    here, there = start_service(notify=False), start_service(notify=False)
    session = await new_session(here)
    async with following(there, session) as follower:
        await follower.until_through(0)
        await here.delete_session(session)
        await follower.until(lambda follower: follower.error is not None, seconds=5)
        assert isinstance(follower.error, SessionNotFound)


async def test_a_reader_that_is_too_slow(service: LogService) -> None:
    """Who does not keep up holds up neither writers nor other followers, and reads on from the table."""
    session = await new_session(service)
    large = NewEvent(payload='{"a":"' + "x" * 20_000 + '"}')
    async with following(service, session) as slow, following(service, session) as quick:
        await slow.until_through(0)
        slow.reading.clear()
        for n in range(200):  # 4 MB, where the tail keeps 1 MiB
            await append(service, session, large)
            await quick.until_through(n + 1, seconds=5)
        assert len(slow.numbers) <= 1
        slow.reading.set()
        await slow.until_through(200)
        assert slow.numbers == quick.numbers == list(range(1, 201))
        # Both get the same from the same memory again.
        await append(service, session, SMALL)
        await slow.until_through(201)
        await quick.until_through(201)
        assert slow.pages[-1].chunks[0] is quick.pages[-1].chunks[0]


async def test_nothing_is_kept_for_sessions_that_nobody_follows(
    service: LogService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tail goes with its last follower."""
    tails: list[weakref.ref[Tail]] = []
    begin = Tail.__init__

    def remember(tail: Tail, session_id: int, max_bytes: int, metrics: FollowMetrics) -> None:
        begin(tail, session_id, max_bytes, metrics)
        tails.append(weakref.ref(tail))

    monkeypatch.setattr(Tail, "__init__", remember)
    session = await new_session(service)
    await append(service, session, SMALL)
    assert not tails
    async with aclosing(service.follow(session, since=0, limit=0, types=())) as one:
        async with aclosing(service.follow(session, since=0, limit=0, types=())) as other:
            await anext(one)
            await anext(other)
        (tail,) = tails
        assert tail() is not None
        await append(service, session, SMALL)
        await anext(one)

    async def gone() -> bool:
        gc.collect()
        return tail() is None

    await until(gone, "the end of the tail")  # somebody may be looking at it just now
    async with aclosing(service.follow(session, since=2, limit=1, types=())) as one:
        await anext(one)
    assert len(tails) == 2


async def test_the_limit_on_followers(start_service: StartService) -> None:
    """One too many is refused; when one leaves there is room again."""
    service = start_service(max_followers=2)
    session = await new_session(service)
    async with following(service, session) as one:
        async with following(service, session) as two:
            await one.until_through(0)
            await two.until_through(0)
            async with following(service, session) as three:
                await three.until(lambda follower: isinstance(follower.error, TooManyFollowers))
        async with following(service, session) as three:
            await three.until_through(0)
    for _ in range(5):  # those who are refused for another reason leave no trace
        async with following(service, session, since=5) as four:
            await four.until(lambda follower: isinstance(follower.error, ServerSeqBeyondHead))
        async with following(service, 10**9) as four:
            await four.until(lambda follower: isinstance(follower.error, SessionNotFound))
    async with following(service, session) as one, following(service, session) as two:
        await one.until_through(0)
        await two.until_through(0)


async def test_heartbeats(service: LogService, monkeypatch: pytest.MonkeyPatch) -> None:
    """In quiet times the bookmark comes again and again; a filter that lets nothing through is quiet, too."""
    monkeypatch.setattr(follow, "HEARTBEAT", 0.1)
    session = await new_session(service)
    await append(service, session, SMALL)
    async with following(service, session) as follower, following(service, session, types=("other",)) as filtered:
        for each, events in ((follower, 1), (filtered, 0)):
            await each.until(lambda follower: len(follower.pages) >= 4)
            assert [len(page.events) for page in each.pages][:4] == [events, 0, 0, 0]
            assert {(page.through, page.head) for page in each.pages} == {(1, 1)}
        await append(service, session, SMALL)
        for each in (follower, filtered):
            await each.until_through(2)


async def test_the_database_restarts(own_cluster: Cluster, start_service: StartService) -> None:
    """A follow outlives a restart of the database, at the head and half-way through the log."""
    service = start_service(own_cluster.url)
    session = await new_session(service)
    await append(service, session, *[SMALL] * 1_000)
    async with (
        following(service, session) as follower,
        following(service, session, first_page_only=True) as catching_up,
    ):
        await follower.until_through(1_000)
        await catching_up.until(lambda follower: bool(follower.pages))
        own_cluster.stop()
        catching_up.reading.set()
        own_cluster.start()

        async def appended() -> bool:
            try:
                await append(service, session, SMALL)
            except StorageUnavailable:
                return False
            return True

        await until(appended, "an append")
        for each in (follower, catching_up):
            await each.until_through(1_001)
            assert each.numbers == list(range(1, 1_002))
            assert each.error is None


async def test_the_database_stays_away(
    own_cluster: Cluster, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the database has been away for too long, follows end with an error that says when to come back."""
    monkeypatch.setattr("collab_service.log.tails.PATIENCE", 0.5)
    service = start_service(own_cluster.url)
    session = await new_session(service)
    async with following(service, session) as follower:
        await follower.until_through(0)
        own_cluster.stop()
        await follower.until(lambda follower: follower.error is not None)
        assert isinstance(follower.error, StorageUnavailable)
        assert follower.error.retry_after
    async with following(service, session) as follower:  # and who comes now is told at once
        await follower.until(lambda follower: isinstance(follower.error, StorageUnavailable))
    own_cluster.start()

    async def follows() -> bool:
        async with following(service, session) as follower:
            await follower.until(lambda follower: bool(follower.pages) or follower.error is not None)
            return follower.error is None

    await until(follows, "a new follow")


async def test_a_database_that_has_lost_events(service: LogService, database_url: str) -> None:
    """Who has seen more than the restored log holds is told, and is not handed its numbers a second time."""
    session = await new_session(service)
    await append(service, session, *[SMALL] * 5)
    async with following(service, session) as follower:
        await follower.until_through(5)
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await connection.execute("DELETE FROM collab_events WHERE session_id = %s AND server_seq > 3", (session,))
        await follower.until(lambda follower: follower.error is not None, seconds=5)
        assert isinstance(follower.error, ServerSeqBeyondHead)


async def test_stopping(start_service: StartService) -> None:
    """A service that stops following ends all follows, and refuses new ones."""
    service = start_service()
    session = await new_session(service)
    async with following(service, session) as follower:
        await follower.until_through(0)
        service.stop_following()
        await follower.until(lambda follower: isinstance(follower.error, ShuttingDown))
    async with following(service, session) as late:
        await late.until(lambda follower: isinstance(follower.error, ShuttingDown))


async def test_more_than_a_message_behind(service: LogService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that is further behind than a message reaches gets the next ones at once, without another turn."""
    monkeypatch.setattr("collab_service.log.tail._REST", 1e9)
    monkeypatch.setattr("collab_service.log.tail._LONGEST_REST", 60.0)
    session_id = await new_session(service)
    async with aclosing(service.follow(session_id, since=0, limit=0, types=())) as pages:
        assert (await anext(pages)).count == 0
        for _ in range(3):
            await append(service, session_id, *[SMALL] * 500)
        async with asyncio.timeout(follow.HEARTBEAT / 2):
            assert [(await anext(pages)).through for _ in range(3)] == [500, 1_000, 1_500]


async def test_followers_who_cannot_keep_up(service: LogService) -> None:
    """What many slow followers are behind by takes bounded memory, and they get all of it."""
    session_id = await new_session(service)
    page, pages = [NewEvent(payload=f'{{"a":"{"x" * 1_000}"}}')] * 500, 40

    async def follow_slowly() -> None:
        reached = 0
        async with aclosing(service.follow(session_id, since=0, limit=pages * len(page), types=())) as found:
            async for each in found:
                assert [event.server_seq for event in each.events] == list(range(reached + 1, reached + 1 + each.count))
                reached += each.count
                end = time.perf_counter() + 0.001
                while time.perf_counter() < end:
                    pass
        assert reached == pages * len(page)

    held: list[int] = []
    async with asyncio.TaskGroup() as followers:
        for _ in range(60):
            followers.create_task(follow_slowly())
        for _ in range(pages):
            await append(service, session_id, *page)
            held.append(sum(each._weight for each in service._tails._tails.values()))
    assert max(held) < 20_000_000  # of 50: four times 1 MiB, and what came with the last turn


async def test_many_sessions_at_once(start_service: StartService) -> None:
    """Followers of many sessions, written through another process, each get all of their own session's events."""
    here, there = start_service(), start_service()
    ids = [await new_session(here) for _ in range(40)]
    followers = [Follower(there, session) for session in ids]
    try:

        async def write(session: int) -> None:
            for n in range(10):
                await append(here, session, NewEvent(client_seq=n), NewEvent(actor_id=str(session)))

        await asyncio.gather(*map(write, ids))
        for session, follower in zip(ids, followers, strict=True):
            await follower.until_through(20)
            assert follower.numbers == list(range(1, 21))
            assert {event.session_id for page in follower.pages for event in page.events} == {session}
    finally:
        for follower in followers:
            await follower.leave()


async def test_a_limit_on_followers_counts_all_sessions() -> None:
    """The limit is that of the process."""
    tails = Tails(None, metrics=unseen().follows, max_followers=1)  # type: ignore[arg-type]  # nothing is read
    with tails.join(1), pytest.raises(TooManyFollowers), tails.join(2):
        pass
    with tails.join(2):
        pass
