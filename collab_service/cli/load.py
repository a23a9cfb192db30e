"""One of the processes that put load on a service for `collab bench`, started by `loads`.

It gets its order through standard input, then the time at which the measurement begins, perhaps the word to stop, and
then the numbers at which the sessions end, a line each. What it sees it reports through standard output. It ends when
its work is done, and when standard input ends, which it does when the parent dies.
"""

import asyncio
import gc
import os
import random
import string
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from itertools import cycle
from time import monotonic_ns

import msgspec

from collab_service.cli.figures import Figures
from collab_service.cli.loads import LINE, STOP, Order, Phase, Report
from collab_service.cli.loop import run
from collab_service.client import Appender, CollabClient, EventPage, NewEvent, RetryPolicy, ServiceError

_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
_ONCE = RetryPolicy(attempts=1)
"""Every failure is seen, and counted."""
_PAUSE = 0.1
"""Seconds for which a writer rests after a failure."""
_REPORT = 1.0
"""Seconds between reports."""
_PATIENCE = 5.0
"""Seconds for which followers wait for what is still to come while nothing comes."""
_FOREVER = 2**63 - 1


def payload_of(size: int) -> str:
    """Return a JSON object of so many bytes; 0 is none, which the service takes for an empty one, and 1 impossible.

    It is made of random letters, the same each time, so that no storage can make it smaller.
    """
    if size < len('{"":""}'):
        return "{}" if size == 0 else f"{{{' ' * (size - 2)}}}"
    letters = random.Random(size).choices(string.ascii_letters + string.digits, k=size - len('{"":""}'))
    return f'{{"{"".join(letters[:4])}":"{"".join(letters[4:])}"}}'


def _share(order: Order, count: int) -> range:
    """Return which of so many writers, followers or events are this process's."""
    return range(order.process, count, order.processes)


class _Follower:
    """Where a follower is."""

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.position = 0
        self.end = _FOREVER
        """The number at which it is done."""
        self.is_there = asyncio.Event()
        """Whether its follow has begun, or failed."""


class _Load:
    """The writers and followers of this process."""

    def __init__(self, order: Order) -> None:
        self.figures = Figures()
        self._order = order
        self._payload = payload_of(order.payload_bytes)
        self._until = _FOREVER
        """When no more is written."""
        self._is_stopped = False
        self._delivered = 0
        """Events that came to followers."""
        self._left = _FOREVER
        """Events that are still to be written."""
        if order.events is not None:
            self._left = len(_share(order, order.events))
        self._targets: list[CollabClient | Appender] = []
        self._followers: dict[asyncio.Task[None], _Follower] = {}

    async def write(self) -> None:
        """Write until the time is over, all is written, or `stop` is called; begin with the warm-up."""
        order = self._order
        start = self.figures.begin - round(order.warm_up * 1e9)
        await asyncio.sleep((start - monotonic_ns()) / 1e9 + 0.002)  # timers of milliseconds may come early
        async with asyncio.TaskGroup() as tasks:
            for writer, target in zip(_share(order, order.writers), cycle(self._targets)):
                tasks.create_task(self._write(writer, target), name=f"writer-{writer}")

    def set_begin(self, begin: int) -> None:
        """Set the time at which the measurement begins; followers need to know before anybody writes."""
        self.figures.begin = self.figures.end = begin
        if self._order.duration is not None:
            self._until = begin + round(self._order.duration * 1e9)

    def stop(self) -> None:
        """Begin no more appends."""
        self._is_stopped = True

    async def _write(self, writer: int, target: CollabClient | Appender) -> None:
        """Append one thing after the other, to one session, or in turn to those that are this writer's."""
        order, figures = self._order, self.figures
        actor = f"writer-{writer}"
        mine = order.sessions[writer :: order.writers] or [order.sessions[writer % len(order.sessions)]]
        for session_id in cycle(mine):
            sent = monotonic_ns()
            is_measured = sent >= figures.begin
            count = min(order.batch, self._left) if is_measured else order.batch
            if self._is_stopped or sent >= self._until or not count:
                return
            if is_measured:
                self._left -= count
            event = NewEvent(self._payload, actor_id=actor, client_seq=sent, type="bench")
            try:
                if order.batch == 1:
                    await target.append(session_id, event)
                else:
                    await target.append_batch(session_id, count * [event])
            except ServiceError as error:
                figures.add_failure(error)
                if error.side_effects == "unknown":
                    figures.doubtful_events += count
                if not error.is_retryable:
                    return
                await asyncio.sleep(_PAUSE)
                continue
            answered = monotonic_ns()
            if is_measured:
                figures.latency.add(answered - sent)
                figures.appends += 1
                figures.events += count
                figures.end = answered
            else:
                figures.warm_up_events += count

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connect, and let the followers follow."""
        order = self._order
        async with AsyncExitStack() as stack:
            for _ in range(order.connections):
                client = await stack.enter_async_context(
                    CollabClient(order.target, retry=_ONCE, options=_OWN_CONNECTION)
                )
                with suppress(ServiceError):  # the appends will tell
                    await client.is_serving()
                target = await stack.enter_async_context(client.appender()) if order.stream else client
                self._targets.append(target)
            readers = [
                await stack.enter_async_context(CollabClient(order.target, options=_OWN_CONNECTION))
                for _ in range(order.connections)
            ]
            for number, client in zip(_share(order, order.followers), cycle(readers)):
                follower = _Follower(order.sessions[number % len(order.sessions)])
                task = asyncio.create_task(self._follow(follower, client), name=f"follower-{number}")
                self._followers[task] = follower
            try:
                for follower in self._followers.values():
                    await follower.is_there.wait()
                yield
            finally:
                for task in self._followers:
                    task.cancel()
                await asyncio.gather(*self._followers, return_exceptions=True)

    async def _follow(self, follower: _Follower, client: CollabClient) -> None:
        try:
            async with aclosing(client.follow_pages(follower.session_id)) as pages:
                async for page in pages:
                    follower.is_there.set()
                    self._deliver(follower, page, monotonic_ns())
                    if follower.position >= follower.end:
                        return
        except ServiceError as error:
            self.figures.add_failure(error)
        finally:
            follower.is_there.set()

    def _deliver(self, follower: _Follower, page: EventPage, now: int) -> None:
        figures = self.figures
        begin = figures.begin
        for event in page.events:
            if event.server_seq != follower.position + 1:
                figures.misplaced += 1
            follower.position = event.server_seq
            sent = event.client_seq or 0
            if sent >= begin:
                figures.lag.add(now - sent)
        self._delivered += len(page.events)

    async def finish(self, heads: Mapping[int, int]) -> None:
        """Wait until the followers have everything up to these numbers, for as long as something comes."""
        under_way: set[asyncio.Task[None]] = set()
        for task, follower in self._followers.items():
            follower.end = heads.get(follower.session_id, 0)
            if follower.position < follower.end and not task.done():
                under_way.add(task)
        delivered = -1
        while under_way and self._delivered > delivered:
            delivered = self._delivered
            _, under_way = await asyncio.wait(under_way, timeout=_PATIENCE)
        self.figures.missing = sum(max(0, follower.end - follower.position) for follower in self._followers.values())


class _Parent:
    """What the parent says, and telling it."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self.go = asyncio.Event()
        self.heads: asyncio.Future[dict[int, int]] = asyncio.get_running_loop().create_future()

    async def listen(self, lines: asyncio.StreamReader) -> None:
        """Do what it says, to the end."""
        async for line in lines:
            if line == STOP:
                self._load.stop()
            elif not self.go.is_set():
                self._load.set_begin(int(line))
                self.go.set()
            else:
                self.heads.set_result(msgspec.json.decode(line, type=dict[int, int]))

    def tell(self, phase: Phase) -> None:
        """Report."""
        line = msgspec.json.encode(Report(phase, self._load.figures)) + b"\n"
        with suppress(BrokenPipeError):  # the parent has died, which is heard in a moment
            os.write(sys.stdout.fileno(), line)  # unbuffered: nothing is left for Python to complain about at its end

    async def tell_every_second(self) -> None:
        """Report while it writes."""
        while True:
            await asyncio.sleep(_REPORT)
            self.tell(Phase.WRITING)


async def _carry_out(load: _Load, parent: _Parent) -> None:
    async with load.connected():
        gc.collect()
        gc.freeze()  # what the imports have made is never looked through again, for 30 to 40 ms each time
        parent.tell(Phase.READY)
        await parent.go.wait()
        telling = asyncio.create_task(parent.tell_every_second(), name="report")
        await load.write()
        telling.cancel()
        parent.tell(Phase.WRITTEN)
        await load.finish(await parent.heads)
        parent.tell(Phase.DONE)


async def _work() -> None:
    lines = asyncio.StreamReader(limit=LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    if order := await lines.readline():  # else the parent has died before it gave one
        load = _Load(msgspec.json.decode(order, type=Order))
        parent = _Parent(load)
        listening = asyncio.create_task(parent.listen(lines), name="parent")
        working = asyncio.create_task(_carry_out(load, parent), name="load")
        await asyncio.wait((listening, working), return_when=asyncio.FIRST_COMPLETED)
        for task in (listening, working):  # the work is done, or the parent has no more use for it
            task.cancel()
        with suppress(asyncio.CancelledError):
            await working
    transport.close()


def main() -> None:
    """Carry out the order."""
    run(_work())
