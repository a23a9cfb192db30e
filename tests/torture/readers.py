"""Who reads and follows: every message is noted, and what was cut goes on behind what has come."""

import asyncio
import random
from contextlib import aclosing, suppress
from itertools import count
from typing import TYPE_CHECKING

from collab_service.client import CollabClient, EventPage, RetryPolicy, ServiceError
from collab_service.client.convert import page_of
from collab_service.client.reading import rpc_errors
from collab_service.v1 import collab_service_pb2 as pb
from tests.torture.history import Closed, History, Opened, Page, page_events
from tests.torture.writers import Sessions, raw_stub
from tests.waiting import until

if TYPE_CHECKING:  # there is no such class when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

_SILENCE = 15.0
"""Seconds without a message after which a stream is opened anew; the service sends one every ten."""
_FINAL = ("SESSION_NOT_FOUND", "SERVER_SEQ_BEYOND_HEAD")


class Reader:
    """Reads one session from a number on, or follows it until it is cancelled or the session is gone."""

    def __init__(self, name: str, history: History, session: int, since: int = 0) -> None:
        self.name = name
        self.session = session
        self.position = since
        """The number of the last event that it has seen."""
        self.is_done = False
        """Whether there is no more to see."""
        self._history = history

    async def follow(self, address: str) -> None:
        """Follow with one call after the other."""
        async with raw_stub(address) as stub:
            while not self.is_done:
                await self.read(stub, follow=True)
                await asyncio.sleep(0.1)

    async def follow_with_client(self, address: str) -> None:
        """Follow with the client, which goes on by itself."""
        self._opened(follow=True)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with CollabClient(address, retry=RetryPolicy(longest_pause=0.5), options=options) as client:
            pages = client.follow_pages(self.session, since=self.position, timeout=120)
            try:
                async with aclosing(pages):
                    async for page in pages:
                        self._note(page)
            except ServiceError as error:
                self._closed(error.reason or type(error).__name__)
                self.is_done = True

    async def read(self, stub: "CollabServiceAsyncStub", *, follow: bool) -> None:
        """Make one call and note what comes."""
        self._opened(follow=follow)
        request = pb.ListEventsRequest(session_id=self.session, since_server_seq=self.position, follow=follow)
        call = stub.ListEvents(request)
        try:
            while True:
                async with asyncio.timeout(_SILENCE):
                    with rpc_errors(writes=False):
                        message = await call.read()
                if not isinstance(message, pb.ListEventsResponse):
                    break
                self._note(page_of(message))
            self._closed("")
        except ServiceError as error:
            self._closed(error.reason or type(error).__name__)
            self.is_done = error.reason in _FINAL
        except TimeoutError:
            self._closed("silence")
        finally:
            call.cancel()

    def _opened(self, *, follow: bool) -> None:
        self._history.entries.append(Opened(self.name, self.session, self.position, follow, self._history.now()))

    def _note(self, page: EventPage) -> None:
        if page.events:
            self.position = page.events[-1].server_seq
        through, head = page.through_server_seq, page.head_server_seq
        events = page_events(page.events)
        self._history.entries.append(Page(self.name, self.session, self._history.now(), events, through, head))

    def _closed(self, reason: str) -> None:
        self._history.entries.append(Closed(self.name, self.session, self._history.now(), reason))


async def read_now_and_then(address: str, history: History, sessions: Sessions, stop: asyncio.Event) -> None:
    """Read the end of some session, each time anew, until told to stop."""
    chances = random.Random(f"{history.seed}/reader")
    async with raw_stub(address) as stub:
        for number in count(1):
            if stop.is_set():
                return
            await asyncio.sleep(chances.uniform(0, 0.2))
            session = chances.choice(sessions.live)
            since = max(0, sessions.heads.get(session, 0) - chances.randint(0, 200))
            await Reader(f"reader-{number}", history, session, since).read(stub, follow=False)


class Followers:
    """Several followers of every session: of raw calls and of the client, directly and through the wire."""

    def __init__(self, history: History, tasks: asyncio.TaskGroup, direct: str, wired: str) -> None:
        self._history = history
        self._tasks = tasks
        self._direct, self._wired = direct, wired
        self._running: list[tuple[Reader, asyncio.Task[None]]] = []

    def watch(self, session: int) -> None:
        """Follow a session from its beginning."""
        raw, wired, client = (
            Reader(f"{kind}-{session}", self._history, session) for kind in ("raw", "wired", "client")
        )
        for reader, work in (
            (raw, raw.follow(self._direct)),
            (wired, wired.follow(self._wired)),
            (client, client.follow_with_client(self._wired)),
        ):
            self._running.append((reader, self._tasks.create_task(work, name=f"follow-{reader.name}")))

    async def finish(self, heads: dict[int, int], seconds: float) -> None:
        """Wait until everybody has seen everything, or that long; then end them. What is missing is found later."""

        async def all_seen() -> bool:
            return all(r.is_done or r.position >= heads.get(r.session, 0) for r, _ in self._running)

        with suppress(AssertionError):
            await until(all_seen, "the end of the followers", seconds)
        for _, task in self._running:
            task.cancel()
