"""Two Yjs clients with one document: what somebody really typed is stored by one and read by the other.

Each update is stored as `{"payload": {"update": "<base64>"}}`, as the web front end does; the reader polls with
`sinceServerSeq`. Meanwhile their gateway is stopped, or killed, and comes back; the service stays.
"""

import asyncio
import base64
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pycrdt import Doc, Text, TransactionEvent

from tests.conftest import TRACES
from tests.gateway.calls import TIMEOUT
from tests.processes import GatewayProcess, ServeProcess

_POLL = 0.02
"""Seconds between looks; the front end looks every second."""
_PATIENCE = 60.0


class Document:
    """A text, in Yjs and as it should be."""

    def __init__(self) -> None:
        self.expected = ""
        self._text = Text()
        self._doc: Doc[Text] = Doc({"text": self._text})
        self._update = b""
        self._subscription = self._doc.observe(self._note)

    def _note(self, event: TransactionEvent) -> None:
        self._update = event.update

    def edit(self, patches: list[tuple[int, int, str]]) -> bytes:
        """Apply a recorded transaction and return the update that brings it to others."""
        with self._doc.transaction():
            for position, deleted, inserted in patches:  # which count characters, where Yjs' binding counts bytes
                before, after = self.expected[:position], self.expected[position + deleted :]
                start = len(before.encode())
                del self._text[start : start + len(self.expected[position : position + deleted].encode())]
                self._text.insert(start, inserted)
                self.expected = before + inserted + after
        return self._update

    def take_in(self, update: bytes) -> None:
        """Apply somebody's update."""
        self._doc.apply_update(update)

    def __str__(self) -> str:
        return str(self._text)


class Author:
    """Stores what was typed, one update after the other, each until it is acknowledged."""

    def __init__(self, http: httpx.AsyncClient, session_id: int) -> None:
        self.document = Document()
        self.stored = 0
        self.failures = 0
        self.changed = asyncio.Condition()
        self._http = http
        self._session_id = session_id

    async def write(self, transactions: list[list[tuple[int, int, str]]]) -> None:
        """Write all transactions."""
        for patches in transactions:
            update = base64.b64encode(self.document.edit(patches)).decode()
            await self._store({"actorId": "ada", "clientSeq": self.stored, "payload": {"update": update}})
            async with self.changed:
                self.stored += 1
                self.changed.notify_all()

    async def _store(self, event: dict[str, Any]) -> None:
        body = {"sessionId": self._session_id, "idempotencyKey": f"update-{self.stored}", **event}
        async with asyncio.timeout(_PATIENCE):
            while True:
                try:
                    answer = await self._http.post("/api/collab/events", json=body)
                except httpx.TransportError:
                    self.failures += 1
                else:
                    if answer.is_success:
                        assert answer.json()["serverSeq"] == self.stored + 1
                        return
                    assert answer.status_code == 503, answer.text
                await asyncio.sleep(_POLL)

    async def reach(self, count: int) -> None:
        """Wait until so many updates are stored."""
        async with asyncio.timeout(_PATIENCE), self.changed:
            await self.changed.wait_for(lambda: self.stored >= count)


async def read(http: httpx.AsyncClient, session_id: int, count: int) -> Document:
    """Poll until so many updates have come, and return the document that they make."""
    document, last = Document(), 0
    async with asyncio.timeout(_PATIENCE):
        while last < count:
            try:
                query = {"sessionId": session_id, "sinceServerSeq": last}
                answer = await http.get("/api/collab/events", params=query)
                events = answer.json() if answer.is_success else []
            except httpx.TransportError:
                events = []
            for event in events:
                assert event["serverSeq"] == last + 1
                last += 1
                document.take_in(base64.b64decode(event["payload"]["update"]))
            await asyncio.sleep(_POLL)
    return document


@pytest.mark.parametrize(
    ("recording", "first", "count", "end"),
    [
        ("clownschool_linear_agents", 0, 400, "terminate"),
        ("rustcode", 4_200, 300, "kill"),  # where there is more than ASCII
    ],
)
async def test_two_clients(
    server: ServeProcess, directory: Path, recording: str, first: int, count: int, end: str
) -> None:
    """Both documents end as the text that was recorded, and every update is stored once."""
    path = TRACES / f"{recording}.json.gz"
    if not path.exists():
        pytest.skip("the recordings lie beside the repository, not in it")
    with gzip.open(path) as file:
        transactions = [transaction["patches"] for transaction in json.load(file)["txns"][: first + count]]
    text = ""
    for patches in transactions[:first]:
        for position, deleted, inserted in patches:
            text = text[:position] + inserted + text[position + deleted :]
    work = [[(0, 0, text)], *transactions[first:]] if first else transactions
    assert first == 0 or not all(inserted.isascii() for patches in work for _, _, inserted in patches)

    gateway = await asyncio.to_thread(GatewayProcess(server.grpc_address, cwd=directory).__enter__)
    address = gateway.http_address
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=TIMEOUT, trust_env=False) as http:
        session_id = (await http.post("/api/collab/sessions", json={"languageId": 1})).json()["id"]
        author = Author(http, session_id)
        async with asyncio.TaskGroup() as both:
            both.create_task(author.write(work))
            reading = both.create_task(read(http, session_id, len(work)))
            await author.reach(len(work) // 3)
            getattr(gateway.process, end)()
            await asyncio.to_thread(gateway.wait)
            gateway.__exit__(None, None, None)
            again = GatewayProcess(server.grpc_address, cwd=directory, http_address=address)
            gateway = await asyncio.to_thread(again.__enter__)
        events = (await http.get("/api/collab/events", params={"sessionId": session_id})).json()
    assert await asyncio.to_thread(gateway.stop) == 0
    gateway.__exit__(None, None, None)
    assert author.failures or end == "terminate"  # in the second before the port closes, everything may be stored
    assert author.document.expected
    assert str(author.document) == author.document.expected == str(reading.result())
    assert [event["clientSeq"] for event in events] == list(range(len(work)))
