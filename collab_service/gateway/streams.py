"""Events on their way to a client, page by page: as an array, as lines, or as server-sent events that follow.

Memory does not grow with the session: the next page is asked for when the one before has been taken. Nor does it with
the number of those who read: only so many pages are on their way at once, others wait for a turn, and who has given a
page away holds it no longer (therefore it is popped from a list). 300 readers of large events that took nothing had
cost 2 GB. An answer that fails half-way is cut off, so that nobody takes it for whole.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager, nullcontext, suppress

import msgspec
from msgspec import Struct
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from collab_service.client import (
    CollabClient,
    Event,
    EventPage,
    Overloaded,
    ServiceError,
    SessionNotFound,
    Unavailable,
)
from collab_service.client.json_form import line_form
from collab_service.gateway.forms import EventsQuery

FOLLOWS = "follows"
"""In the state of a request: its answer has no end of its own."""
_encode = msgspec.json.Encoder().encode
_RETRY = b"retry: 2000\n\n"
"""Milliseconds after which a browser comes again."""


class CutOff(Exception):
    """An answer cannot be finished; the message is the code of the error, which is the cause."""


Items = AsyncGenerator[Iterable[Struct], None]


async def array(items: Items) -> AsyncGenerator[bytes, None]:
    """Yield what comes as the parts of one JSON array."""
    separator = b"["
    async with aclosing(items):
        async for page in items:
            parts = [b",".join(map(_encode, page))]
            del page
            if parts[0]:
                parts[0] = separator + parts[0]
                separator = b","
                yield parts.pop()
    yield b"[]" if separator == b"[" else b"]"


async def lines(items: Items) -> AsyncGenerator[bytes, None]:
    """Yield what comes as lines of JSON."""
    async with aclosing(items):
        async for page in items:
            parts = [b"".join(_encode(item) + b"\n" for item in page)]
            del page
            if parts[0]:
                yield parts.pop()


class _Answer(StreamingResponse):
    """An answer in parts that holds none of them, nor leaves one to the garbage collector when it is cut off."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.stream_response(send), name="send")
        leaving = asyncio.create_task(self.listen_for_disconnect(receive), name="client-leaves")
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.wait((sending, leaving))
            del sending, leaving  # its error knows this frame

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        parts = aiter(self.body_iterator)
        with suppress(StopAsyncIteration):
            while True:
                await send({"type": "http.response.body", "body": await anext(parts), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begun(content: AsyncGenerator[bytes, None], media_type: str) -> StreamingResponse:
    """Return an answer whose first part is there already: what fails before has a status of its own."""
    first = [await anext(content, b"")]

    async def whole() -> AsyncIterator[bytes]:
        async with aclosing(content):
            yield first.pop()
            try:
                while True:
                    yield await anext(content)
            except StopAsyncIteration:
                pass
            except ServiceError as error:
                raise CutOff(error.reason or type(error).__name__) from error

    return _Answer(whole(), media_type=media_type)


class Followers:
    """The server-sent events that are being sent, which can be ended all together."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._ending: set[asyncio.Timeout] = set()
        self._closed = False
        self.count: Counter[int] = Counter()
        """How many follow through this gateway, by session."""

    def close(self) -> None:
        """End them all, also those that come from now on: a browser comes again after two seconds."""
        self._closed = True
        for timeout in self._ending:
            timeout.reschedule(asyncio.get_running_loop().time())

    async def answer(self, client: CollabClient, query: EventsQuery, since: int, types: list[str]) -> StreamingResponse:
        """Return an answer that follows a session.

        Raises:
            ServiceError: What coming again does not help.
        """
        pages = client.follow_pages(query.session_id, since=since, limit=query.limit, types=types)
        content = self._events(pages, query.session_id, since)
        headers = {
            "cache-control": "no-store, no-transform",
            "x-accel-buffering": "no",  # to nginx and those who do as it does
        }
        response = await begun(content, "text/event-stream")
        response.headers.update(headers)
        return response

    async def _events(
        self, pages: AsyncGenerator[EventPage, None], session_id: int, since: int
    ) -> AsyncGenerator[bytes, None]:
        told, was_caught_up, prefix = since, False, _RETRY
        with self._counted(session_id):
            try:
                async with aclosing(pages):
                    while True:
                        # What is there already is read in turns. What is new comes when it comes.
                        async with nullcontext() if was_caught_up else self._turns:
                            if (page := await self._next(pages)) is None:
                                break
                            parts = [prefix, *map(_event, page.events)]
                            prefix = b""
                            if page.events:
                                told = page.events[-1].server_seq
                            moved_on = page.through_server_seq > told
                            if moved_on:
                                # A filter let nothing through: a client that comes again need not begin before this.
                                told = page.through_server_seq
                                parts.append(b"id: %d\n" % told)
                            if page.is_caught_up and not was_caught_up:
                                head = page.head_server_seq
                                parts.append(b'event: caught-up\ndata: {"headServerSeq": %d}\n\n' % head)
                            elif moved_on or not page.events:
                                parts.append(b": heartbeat\n\n")
                            was_caught_up = page.is_caught_up
                            del page
                            parts = [b"".join(parts)]
                            yield parts.pop()
            except (Unavailable, Overloaded):
                # A browser never comes again after a 503 or a 429.
                yield _RETRY
                return
            except SessionNotFound:
                if prefix:
                    raise
                return  # it was deleted: a browser comes again, is told so, and stays away
        if prefix:
            yield prefix

    async def _next(self, pages: AsyncGenerator[EventPage, None]) -> EventPage | None:
        """Return the next page; None at the end, or when this gateway is stopping."""
        if self._closed:
            return None
        try:
            async with asyncio.timeout(None) as ending:
                self._ending.add(ending)
                return await anext(pages, None)
        except TimeoutError:
            return None
        finally:
            self._ending.discard(ending)

    @contextmanager
    def _counted(self, session_id: int) -> Iterator[None]:
        self.count[session_id] += 1
        try:
            yield
        finally:
            self.count[session_id] -= 1
            if not self.count[session_id]:
                del self.count[session_id]


def _event(event: Event) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (event.server_seq, _encode(line_form(event)))
