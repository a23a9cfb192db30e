"""Three people who really wrote together write again, at the same time, through two worker processes.

The recording says what each had seen when they wrote (`parents`). So each author is a Yjs document that takes in, from
its own follow, exactly what that person had seen, then makes the recorded change and appends the update it gives. Ten
followers, some of which begin in the middle or are cut and resumed, take in the updates as they come.
"""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pycrdt import Doc, Text, TransactionEvent

from collab_service.model.chain import chain_start, first_broken_link
from collab_service.v1 import collab_service_pb2 as pb
from tests.conftest import TRACES
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT
from tests.rpc.content import stored_event
from tests.rpc.follows import connect

AGENTS = 3
FOLLOWERS = 10
_PATIENCE = 500.0
"""Seconds for the others to write: for long stretches only one of the three does."""

RECORDING = TRACES / "clownschool_concurrent.json.gz"

Seen = tuple[int, ...]
"""How many transactions of each agent somebody has seen."""


class Document:
    """A text that is written by several people."""

    def __init__(self) -> None:
        self._text = Text()
        self._doc: Doc[Text] = Doc({"text": self._text})
        self._update = b""
        self._subscription = self._doc.observe(self._note)

    def _note(self, event: TransactionEvent) -> None:
        self._update = event.update

    def edit(self, patches: list[tuple[int, int, str]]) -> bytes:
        """Apply a recorded transaction and return the update that brings it to others."""
        with self._doc.transaction():
            for position, deleted, inserted in patches:  # this recording is all ASCII, where every way to count agrees
                del self._text[position : position + deleted]
                self._text.insert(position, inserted)
        return self._update

    def take_in(self, update: bytes) -> None:
        """Apply somebody's update."""
        self._doc.apply_update(update)

    def __str__(self) -> str:
        return str(self._text)


def seen_before(transactions: list[dict[str, Any]]) -> list[Seen]:
    """Return for each transaction how many of each agent its author had seen, their own included."""
    after: list[Seen] = []
    before = []
    for transaction in transactions:
        had_seen = tuple(max((after[parent][n] for parent in transaction["parents"]), default=0) for n in range(AGENTS))
        before.append(had_seen)
        after.append(tuple(seen + (n == transaction["agent"]) for n, seen in enumerate(had_seen)))
    return before


class Progress:
    """How much of the recording has been acknowledged."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Condition()

    async def add(self) -> None:
        """Note one more."""
        async with self._changed:
            self._count += 1
            self._changed.notify_all()

    async def reach(self, count: int) -> None:
        """Wait until there are so many."""
        async with asyncio.timeout(_PATIENCE), self._changed:
            await self._changed.wait_for(lambda: self._count >= count)


class Author:
    """One of the people, at work."""

    def __init__(self, agent: int) -> None:
        self.agent = agent
        self._document = Document()
        self._updates: tuple[list[bytes], ...] = tuple([] for _ in range(AGENTS))
        """What has been heard of each agent."""
        self._taken_in = [0] * AGENTS
        self._heard = asyncio.Condition()

    async def hear(self, address: str, session: int) -> None:
        """Follow the session, for ever."""
        async with connect(address) as stub:
            async for message in stub.ListEvents(pb.ListEventsRequest(session_id=session, follow=True)):
                async with self._heard:
                    for event in message.events:
                        self._updates[int(event.actor_id)].append(event.binary)
                    self._heard.notify_all()

    async def write(
        self, address: str, session: int, work: list[tuple[Seen, list[tuple[int, int, str]]]], progress: Progress
    ) -> None:
        """Write each transaction, having seen what the person had seen."""
        async with connect(address) as stub:
            for number, (had_seen, patches) in enumerate(work):
                async with asyncio.timeout(_PATIENCE):
                    await self._see(had_seen)
                event = pb.NewEvent(actor_id=str(self.agent), client_seq=number, binary=self._document.edit(patches))
                await stub.AppendEvent(pb.AppendEventRequest(session_id=session, event=event), timeout=TIMEOUT)
                await progress.add()

    async def _see(self, had_seen: Seen) -> None:
        for agent, count in enumerate(had_seen):
            if agent != self.agent:
                async with self._heard:
                    await self._heard.wait_for(lambda agent=agent, count=count: len(self._updates[agent]) >= count)  # type: ignore[misc]
                for update in self._updates[agent][self._taken_in[agent] : count]:
                    self._document.take_in(update)
                self._taken_in[agent] = max(self._taken_in[agent], count)


async def read_live(address: str, session: int, number: int, total: int, progress: Progress) -> str:
    """Follow as one of ten, of which some begin late and some are cut every few hundred events; return the text."""
    document = Document()
    last = 0
    await progress.reach(total * number // (2 * FOLLOWERS))
    while last < total:
        cut = total if number % 3 else last + 500 + 10 * number
        request = pb.ListEventsRequest(session_id=session, since_server_seq=last, follow=True)
        async with connect(address) as stub:
            async for message in stub.ListEvents(request, timeout=_PATIENCE):
                for event in message.events:
                    assert event.server_seq == last + 1
                    last += 1
                    document.take_in(event.binary)
                if last >= min(cut, total):
                    break
    return str(document)


async def write_together(database_url: str, directory: Path, count: int) -> None:
    """Write the first `count` transactions, and compare all texts."""
    with gzip.open(RECORDING) as file:
        transactions: list[dict[str, Any]] = json.load(file)["txns"][:count]
    total = len(transactions)
    work: list[list[Any]] = [[] for _ in range(AGENTS)]
    for had_seen, transaction in zip(seen_before(transactions), transactions, strict=True):
        work[transaction["agent"]].append((had_seen, transaction["patches"]))
    with ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory) as server:
        address = server.grpc_address
        async with connect(address) as stub:
            session = (await stub.CreateSession(pb.CreateSessionRequest(), timeout=TIMEOUT)).session.id
            progress = Progress()
            authors = [Author(agent) for agent in range(AGENTS)]
            hearing = [asyncio.create_task(author.hear(address, session)) for author in authors]
            async with asyncio.TaskGroup() as everybody:
                for author in authors:
                    everybody.create_task(author.write(address, session, work[author.agent], progress))
                readers = [
                    everybody.create_task(read_live(address, session, number, total, progress))
                    for number in range(FOLLOWERS)
                ]
            for task in hearing:
                task.cancel()
            await asyncio.gather(*hearing, return_exceptions=True)
            log = [
                event
                async for message in stub.ListEvents(pb.ListEventsRequest(session_id=session), timeout=TIMEOUT)
                for event in message.events
            ]
        assert await asyncio.to_thread(server.stop) == 0
    document = Document()
    for event in log:
        document.take_in(event.binary)
    assert [event.server_seq for event in log] == list(range(1, total + 1))
    assert {reader.result() for reader in readers} == {str(document)}
    check_causes(transactions, log)
    assert first_broken_link(chain_start(session), map(stored_event, log)) is None
    assert {line["worker"] for line in server.lines if line.get("event") == "call was cancelled"} == {1, 2}


def check_causes(transactions: list[dict[str, Any]], log: list[pb.Event]) -> None:
    """Check that in the log no effect comes before its cause, and each author's events stay in their order."""
    number = {(int(event.actor_id), event.client_seq): event.server_seq for event in log}
    assert len(number) == len(transactions)
    counts = [0] * AGENTS
    places: list[int] = []
    for transaction in transactions:
        agent = transaction["agent"]
        places.append(number[agent, counts[agent]])
        counts[agent] += 1
        assert all(places[parent] < places[-1] for parent in transaction["parents"])


@pytest.mark.skipif(not RECORDING.exists(), reason="the recordings lie beside the repository, not in it")
async def test_the_beginning(database_url: str, directory: Path) -> None:
    """Ten texts that are rebuilt live agree with the log's, in the first few thousand transactions."""
    await write_together(database_url, directory, 2_500)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not RECORDING.exists(), reason="the recordings lie beside the repository, not in it")
async def test_the_whole(database_url: str, directory: Path) -> None:
    """Ten texts that are rebuilt live agree with the log's, in the whole recording."""
    await write_together(database_url, directory, 1_000_000)
