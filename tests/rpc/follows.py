"""Following sessions in the tests, and what always has to hold of what comes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import grpc

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

if TYPE_CHECKING:  # there is no such class when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

PATIENCE = 30.0


@asynccontextmanager
async def connect(address: str) -> AsyncIterator["CollabServiceAsyncStub"]:
    """Open a connection of its own."""
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield CollabServiceStub(channel)


class Follow:
    """A follower that keeps every message."""

    def __init__(self, stub: "CollabServiceAsyncStub", session_id: int, since: int = 0, **fields: Any) -> None:
        """Begin to follow; use it as a context manager, so that it ends."""
        self.since = since
        self.messages: list[pb.ListEventsResponse] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.ended = False
        self._changed = asyncio.Condition()
        request = pb.ListEventsRequest(session_id=session_id, since_server_seq=since, follow=True, **fields)
        self._call = stub.ListEvents(request)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async for message in self._call:
                self.messages.append(message)
                async with self._changed:
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.ended = True
            async with self._changed:
                self._changed.notify_all()

    async def until(self, holds: Callable[["Follow"], bool], seconds: float = PATIENCE) -> Self:
        """Wait until a condition holds; fail when the stream ends before, or after a while."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: self.ended or holds(self))
        assert holds(self), self.error or self.numbers[-3:]
        return self

    async def until_through(self, number: int, seconds: float = PATIENCE) -> Self:
        """Wait for the bookmark of a number."""
        return await self.until(lambda follow: follow.through >= number, seconds)

    async def until_ended(self, seconds: float = PATIENCE) -> grpc.aio.AioRpcError | None:
        """Wait for the end and return the error, if it was one."""
        await self.until(lambda follow: follow.ended, seconds)
        return self.error

    @property
    def events(self) -> list[pb.Event]:
        """Every event that came."""
        return [event for message in self.messages for event in message.events]

    @property
    def numbers(self) -> list[int]:
        """The number of every event that came."""
        return [event.server_seq for event in self.events]

    @property
    def through(self) -> int:
        """The last bookmark."""
        return self.messages[-1].through_server_seq if self.messages else -1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def check_bookmarks(follow: Follow) -> None:
    """Check what holds of every stream's bookmarks: they rise, cover what was delivered, and never pass the head."""
    for message in follow.messages:
        if message.events:
            assert message.through_server_seq >= message.events[-1].server_seq
        assert message.head_server_seq >= message.through_server_seq
        assert len(message.events) <= 500
    for earlier, later in pairwise(follow.messages):
        assert earlier.through_server_seq <= later.through_server_seq
        assert earlier.head_server_seq <= later.head_server_seq
        assert all(event.server_seq > earlier.through_server_seq for event in later.events)
