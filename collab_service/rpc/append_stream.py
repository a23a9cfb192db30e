"""`AppendStream`: many appends on their way at once, carried out and answered in the order in which they came."""

import asyncio
from collections import deque
from collections.abc import Callable
from copy import copy

from msgspec import Struct

from collab_service.log.decide import Appended, AppendRequest, Decision
from collab_service.log.queue import Pending, Succession
from collab_service.log.service import LogService
from collab_service.model.errors import CollabError, InvalidArgument, Overloaded, ReaderStalled
from collab_service.rpc.convert import appended_message
from collab_service.rpc.reads import Context, Requests
from collab_service.rpc.status import append_failure
from collab_service.rpc.writes import begin
from collab_service.v1 import collab_service_pb2 as pb

_REQUESTS = 256
_BYTES = 8 * 1024 * 1024
"""What may be on its way for one stream: requests, and their bytes, of which one request may have more."""
_ALL_BYTES = 64 * 1024 * 1024
"""What may be on its way for all streams together, from where on those that have something on their way read nothing
more. One that has nothing there has to read, or it would not see what comes; if there is no room for that, it ends."""
_RECEIVED_BYTES = 256 * 1024 * 1024
"""What may be being received for all streams, as far as can be told before it has come."""
_STALLED = 60.0
"""Seconds after which a caller that takes no answer is ended."""


class HeldByStreams:
    """Bytes of requests that all streams of a process hold, from when they were read until they are answered."""

    def __init__(self) -> None:
        self._size = 0
        self._usual = 1.0
        """Bytes of a request of late."""

    def check_room(self, streams: int) -> None:
        """Raise `Overloaded` if there is no room for one stream more; each may be receiving a request at any time."""
        if self.is_too_much or streams * self._usual > _RECEIVED_BYTES:
            raise Overloaded("too much is on its way in streams of appends on this server")

    @property
    def is_too_much(self) -> bool:
        """Whether streams that have something on their way had better read nothing more."""
        return self._size >= _ALL_BYTES

    def take(self, size: int, *, alone: bool) -> None:
        """Take note of a request that was read.

        Args:
            size: Its bytes.
            alone: Whether it is the only one of its stream.

        Raises:
            Overloaded: There is no room for it.
        """
        self._usual += (size - self._usual) / 16
        if self._size and self._size + size > (_ALL_BYTES if alone else 2 * _ALL_BYTES):
            raise Overloaded("too much is on its way in streams of appends on this server")
        self._size += size

    def give_back(self, size: int) -> None:
        """Take note of requests that are held no longer."""
        self._size -= size


class _Entry(Struct):
    """A request that was read, and what became of it."""

    number: int
    size: int
    outcome: Pending | CollabError


class AppendStream:
    """One call of `AppendStream`.

    One task reads requests and lets them wait to be written; the other waits for what became of them and answers.
    When there is no room (too much is on its way here, or in all streams, or too much waits in this process) nothing
    more is read, which the caller's grpc notices by itself.
    """

    def __init__(
        self,
        service: LogService,
        check: Callable[[pb.AppendEventsRequest], AppendRequest],
        context: Context,
        held: HeldByStreams,
    ) -> None:
        """Prepare; `run` does it.

        Args:
            service: Where to append.
            check: Returns what a request asks for; raises `InvalidArgument`.
            context: Sends the answers.
            held: What all streams hold together.
        """
        self._service = service
        self._check = check
        self._context = context
        self._begun = False
        self._held = held
        self._succession = Succession()
        self._on_their_way: deque[_Entry] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None]
        self._requests: Requests[pb.AppendStreamRequest]
        self._reads_no_more = False
        self._is_sending = False
        self._being_told: _Entry | None = None
        """The request whose answer is on its way."""
        self._end: CollabError | None = None

    async def run(self, requests: Requests[pb.AppendStreamRequest]) -> None:
        """Answer requests until there are no more.

        Raises:
            CollabError: The stream has to end: a request could not be carried out through no fault of its own, or the
                server stops. What was not answered may or may not be stored.
        """
        self._requests = requests
        requests.end, requests.is_busy = self._end_since_it_waits, self._awaits_outcomes
        self._reader = asyncio.create_task(self._read(requests), name="append-stream")
        self._reader.add_done_callback(lambda reader: reader.cancelled() or reader.exception())  # or it is told below
        try:
            while (entry := await self._next()) is not None:
                outcome = entry.outcome
                decision: Decision = await outcome.answer if isinstance(outcome, Pending) else outcome
                self._on_their_way.popleft()
                self._release(entry.size)
                self._changed.set()
                self._being_told = entry
                await self._send(_answer(entry.number, decision))
                self._being_told = None
            if self._end is not None:
                raise self._end
            await self._reader  # raises what has ended it
        except CollabError as error:
            raise self._speaking_for_all(error) from error.__cause__
        finally:
            self._stop_reading()
            for entry in self._on_their_way:
                if isinstance(entry.outcome, Pending):
                    self._service.withdraw(entry.outcome)
            self._release(self._size)

    def _speaking_for_all(self, error: CollabError) -> CollabError:
        """Return what ends the stream, such that its side effects are those of all that was not answered."""
        unanswered = [*self._on_their_way, *([self._being_told] if self._being_told else [])]
        if error.may_have_been_written or not any(_may_be_stored(entry.outcome) for entry in unanswered):
            return error
        own = copy(error)  # others were told the same one
        own.may_have_been_written = True
        return own

    def stop(self, why: CollabError) -> None:
        """Read nothing more; end with this error when what has been read is answered."""
        self._end = self._end or why
        self._stop_reading()

    async def _end_since_it_waits(self) -> None:
        self.stop(Overloaded("this server's memory is full, and streams that wait for requests are ended"))

    def _awaits_outcomes(self) -> bool:
        return bool(self._on_their_way) and not self._is_sending

    def _stop_reading(self) -> None:
        self._reads_no_more = True
        self._changed.set()
        if not self._requests.is_waiting:
            self._reader.cancel()

    async def _read(self, requests: Requests[pb.AppendStreamRequest]) -> None:
        try:
            async for message in requests:
                if self._reads_no_more:
                    return
                size = message.request.ByteSize()
                self._held.take(size, alone=not self._on_their_way)
                self._size += size
                number = message.request_number
                try:
                    append = self._check(message.request)
                    del message  # what waits is held once
                    outcome: Pending | CollabError = await self._service.submit(append, self._succession)
                    del append
                except InvalidArgument as error:
                    outcome = error
                self._on_their_way.append(_Entry(number, size, outcome))
                self._changed.set()
                while self._on_their_way and self._holds_enough():
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            self._reads_no_more = True
            self._changed.set()

    def _holds_enough(self) -> bool:
        return len(self._on_their_way) >= _REQUESTS or self._size >= _BYTES or self._held.is_too_much

    def _release(self, size: int) -> None:
        self._size -= size
        self._held.give_back(size)

    async def _next(self) -> _Entry | None:
        """Return the first request that is not answered, once there is one; None when none will come."""
        while not self._on_their_way:
            if self._reads_no_more:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._on_their_way[0]

    async def _send(self, answer: pb.AppendStreamResponse) -> None:
        self._is_sending = True
        try:
            async with asyncio.timeout(_STALLED):
                if not self._begun:
                    await begin(self._context)
                    self._begun = True
                await self._context.write(answer)
        except TimeoutError:
            raise ReaderStalled from None
        finally:
            self._is_sending = False


def _may_be_stored(outcome: Pending | CollabError) -> bool:
    if isinstance(outcome, CollabError):
        return False
    if not outcome.answer.done():
        return not outcome.is_waiting
    if outcome.answer.cancelled():
        return False
    error = outcome.answer.exception()
    if error is not None:
        return not isinstance(error, CollabError) or error.may_have_been_written
    return isinstance(outcome.answer.result(), Appended)


def _answer(number: int, decision: Decision) -> pb.AppendStreamResponse:
    if isinstance(decision, Appended):
        return pb.AppendStreamResponse(request_number=number, response=appended_message(decision))
    return pb.AppendStreamResponse(request_number=number, failure=append_failure(decision))
