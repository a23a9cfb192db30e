"""Readers that take nothing for too long are told so, and what they have left lying is forgotten once they take it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from collab_service.config import Config
from collab_service.rpc import stuck, writes
from collab_service.rpc.server import Server
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.log.logs import unseen
from tests.rpc.calls import Failure
from tests.waiting import until

_EVENT_BYTES = 900_000


@pytest.fixture
async def impatient(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, str]]:
    """A server here and its address; it ends stalled readers after half a second, and bears 3 MB of what they leave."""
    monkeypatch.setattr(writes, "_STALLED", 0.5)
    monkeypatch.setattr(stuck, "_MOST_BYTES", 3_000_000)
    config = Config(data_dir=Path("/nonexistent"), grpc_address="127.0.0.1:0")
    deaths: list[str] = []
    server = Server(config, database_url, metrics=unseen(), on_death=lambda: deaths.append("died"))
    yield server, await server.start()
    await server.stop(5)
    assert not deaths


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("taken", [0, 1])
async def test_they_are_told_when_they_read_on(impatient: tuple[Server, str], follow: bool, taken: int) -> None:
    """Whether or not they have ever taken a message; and their connection lives, however often it happens."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]
    server, address = impatient
    left_lying = server._servicer.writes._stuck
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = CollabServiceStub(channel)
        session = (await stub.CreateSession(pb.CreateSessionRequest())).session.id
        for _ in range(5):
            event = pb.NewEvent(binary=bytes(_EVENT_BYTES))
            await stub.AppendEvent(pb.AppendEventRequest(session_id=session, event=event))
        healthy = stub.ListEvents(pb.ListEventsRequest(session_id=session, since_server_seq=5, follow=True))
        first = await healthy.read()
        assert isinstance(first, pb.ListEventsResponse)
        assert first.through_server_seq == 5
        for _ in range(5):
            call = stub.ListEvents(pb.ListEventsRequest(session_id=session, follow=follow))
            for _ in range(taken):
                await call.read()

            async def is_ended() -> bool:
                return left_lying._bytes > 0

            await until(is_ended, "the end of the stalled reader")
            async with asyncio.timeout(60):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await call.read() is not grpc.aio.EOF:
                        pass
            assert (caught.value.code(), Failure(caught.value).reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OVERLOADED",
            )

            async def is_forgotten() -> bool:
                return left_lying._bytes == 0

            await until(is_forgotten, "what was left lying to be forgotten")
        event = pb.NewEvent(type="more")
        await stub.AppendEvent(pb.AppendEventRequest(session_id=session, event=event))
        last = await healthy.read()
        assert isinstance(last, pb.ListEventsResponse)
        assert [event.type for event in last.events] == ["more"]
        healthy.cancel()
