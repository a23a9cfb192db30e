"""Reads and follows a session across cuts: a position, and a stream that is opened anew after it."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from collab_service.client.convert import message_of, page_of
from collab_service.client.errors import ServiceError, Unavailable, Violation, error_of, invalid
from collab_service.client.request_id import call_metadata
from collab_service.client.retry import SHORTEST_ATTEMPT, Backoff, RetryPolicy
from collab_service.client.values import EventPage
from collab_service.v1 import collab_service_pb2 as pb

if TYPE_CHECKING:  # there is no such class when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

_log = logging.getLogger(__name__)

OF_COLUMNS = ("collab-events-of", "columns")
"""Metadata that asks for events as the columns have them."""
_SILENCE = 30.0
"""Seconds without a message after which a stream is taken to be dead. The service sends one every ten."""


@contextmanager
def rpc_errors(*, writes: bool) -> Iterator[None]:
    """Turn what grpc raises into `ServiceError`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error, writes=writes) from error
    except asyncio.CancelledError as error:
        # grpc.aio raises it also when the server has cancelled the call; then nobody has cancelled this task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("the service has cancelled the call", side_effects="unknown" if writes else "none") from error
    except grpc.aio.UsageError as error:  # between two attempts
        raise RuntimeError("the client was closed while it was in use") from error


@dataclass(slots=True)
class Cursor:
    """Where a reader is, and what it wants."""

    session_id: int
    position: int
    """The number up to which everything that was asked for has come."""
    left: int
    """Events until the end; 0 means that there is no such end."""
    types: Sequence[str]
    follow: bool
    of_columns: bool = False
    """Whether the service shall read the columns of its tables only; see `CollabClient.read_pages`."""
    end: int | None = None
    """The number at which a read that does not follow ends: the head when it began."""

    def request(self) -> pb.ListEventsRequest:
        """Return the request for what comes next; raises `InvalidRequest` as `message_of` does."""
        if isinstance(self.types, str):  # a sequence of letters, to Python
            raise invalid([Violation("types", f"must be a list of types; did you mean [{self.types!r}]?")])
        return message_of(
            pb.ListEventsRequest,
            session_id=self.session_id,
            since_server_seq=self.position,
            limit=self.left,
            follow=self.follow,
            types=self.types,
        )

    def advance(self, page: EventPage) -> EventPage:
        """Move on behind a page, and return the part of it that was asked for."""
        if self.end is None and not self.follow:
            self.end = page.head_server_seq
        if self.end is not None and page.head_server_seq > self.end:  # the stream is not the first, and reaches further
            events = [event for event in page.events if event.server_seq <= self.end]
            page = EventPage(events, min(page.through_server_seq, self.end), self.end)
        self.position = page.through_server_seq
        if self.left:
            self.left -= len(page.events)
            self.is_done = self.left == 0
        return page

    is_done: bool = False
    """Whether the limit has been reached."""

    @property
    def is_at_the_end(self) -> bool:
        """Whether nothing more is to come."""
        return self.is_done or (self.end is not None and self.position >= self.end)


async def pages(
    stub: "CollabServiceAsyncStub", cursor: Cursor, policy: RetryPolicy, *, timeout: float, patience: float = math.inf
) -> AsyncGenerator[EventPage, None]:
    """Yield what comes after the cursor, each event once and in order, whatever is cut in between.

    Args:
        stub: The service.
        cursor: What to read; it moves.
        policy: The pauses between attempts.
        timeout: Seconds until the first message, all attempts together.
        patience: Seconds to go on trying after a stream that had begun was cut, until the next message.

    Raises:
        ServiceError: What waiting does not help, or has not helped for so long.
    """
    loop = asyncio.get_running_loop()
    backoff = Backoff(policy)
    give_up_at = loop.time() + timeout
    while True:
        request = cursor.request()
        with rpc_errors(writes=False):
            metadata = (*call_metadata(), OF_COLUMNS) if cursor.of_columns else call_metadata()
            call = stub.ListEvents(request, metadata=metadata)
        try:
            while True:
                message = await _next_message(call, give_up_at)
                if message is None:
                    return
                give_up_at = math.inf
                backoff.reset()
                held = [cursor.advance(page_of(message))]
                del message  # what is large is not held while somebody is busy with it
                yield held.pop()
                if cursor.is_at_the_end:
                    return
        except ServiceError as error:
            now = loop.time()
            if give_up_at == math.inf:
                give_up_at = now + patience
                _log.info("reading session %s was cut after %s: %s", cursor.session_id, cursor.position, error)
            pause = backoff.next(error.retry_after) if error.is_retryable else None
            if pause is None or now + pause + SHORTEST_ATTEMPT >= give_up_at:
                raise
        finally:
            call.cancel()
        await asyncio.sleep(pause)


async def _next_message(
    call: "grpc.aio.UnaryStreamCall[pb.ListEventsRequest, pb.ListEventsResponse]", give_up_at: float
) -> pb.ListEventsResponse | None:
    """Return the next message; None at the end of the stream."""
    silent_at = asyncio.get_running_loop().time() + _SILENCE
    # Not cancelled with this task, but by the end of the call: grpc would keep for ever a message that has just come.
    reading = asyncio.ensure_future(call.read())
    reading.add_done_callback(lambda reading: reading.cancelled() or reading.exception())  # or it is told below
    try:
        async with asyncio.timeout_at(min(silent_at, give_up_at)):
            with rpc_errors(writes=False):
                message = await asyncio.shield(reading)
    except TimeoutError as error:
        raise Unavailable("the service does not answer: it was silent for too long") from error
    return message if isinstance(message, pb.ListEventsResponse) else None
