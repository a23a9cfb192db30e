"""Appends of any number of coroutines over one stream, each with its own acknowledgement.

A call of its own for every event costs ten times what the event costs. So events that wait for the same session travel
together as one batch, and several batches are on their way at once. A batch is made when there is room on the way, of
what has come until then: a lone event leaves at once, and the busier it gets the larger batches are.

When the stream is cut, nobody knows what became of the batches that were not answered. They are sent again, unchanged
and in their order; each has an idempotency key, so that none is stored twice.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Self

import grpc

from collab_service.client.convert import message_of
from collab_service.client.errors import (
    DeadlineExceeded,
    InternalError,
    ServiceError,
    TooLarge,
    Unavailable,
)
from collab_service.client.outbox import Batch, Item, Outbox, messages_of
from collab_service.client.reading import rpc_errors
from collab_service.client.request_id import call_metadata
from collab_service.client.retry import Backoff, RetryPolicy
from collab_service.client.values import Acknowledged, AppendedBatch, NewEvent
from collab_service.v1 import collab_service_pb2 as pb

if TYPE_CHECKING:  # there are no such classes when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

    _Call = grpc.aio.StreamStreamCall[pb.AppendStreamRequest, pb.AppendStreamResponse]

_ALONE = 10.0
"""Seconds for a batch that is sent in a call of its own."""
_TICK = 0.1
"""Seconds between looks for callers whose time is up."""


class Appender:
    """Appends events of any number of coroutines; made by `CollabClient.appender`. Use it as a context manager.

    Leaving the context waits for what is under way. Events go through a stream that is opened with the first one, and
    again when it was cut; what waits in memory is bounded by bytes, above which callers wait.
    """

    def __init__(
        self,
        stub: "CollabServiceAsyncStub",
        *,
        retry: RetryPolicy,
        timeout: float,
        new_key: Callable[[], str],
    ) -> None:
        self._stub = stub
        self._timeout = timeout
        self._outbox = Outbox(new_key)
        self._backoff = Backoff(retry)
        self._newly_sent: list[Batch] = []
        """Those that were sent on this stream for the first time."""
        self._careful = False
        """Whether one batch is sent at a time, since one of those that were not answered has ended the stream."""
        self._trouble: ServiceError | None = None
        """Why nothing is answered."""
        self._ticking: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin; the stream is opened with the first event."""
        if self._task is not None:
            raise RuntimeError("the appender is open already")
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="appender")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is under way, unless an exception leaves the context; then end."""
        assert self._task is not None
        try:
            if kind is None:
                await self._outbox.idle.wait()
        finally:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def append(
        self,
        session_id: int,
        event: NewEvent,
        *,
        expected_last_server_seq: int | None = None,
        timeout: float | None = None,
    ) -> Acknowledged:
        """Append an event. When it returns, the event is durable and every later read sees it.

        The events of a session are stored in the order of the calls, unless one is refused: those that travelled with
        it are sent once more, and may then come behind later ones.

        Args:
            session_id: The session.
            event: The event. It needs no idempotency key to be stored once.
            expected_last_server_seq: Append only if this is the session's last number; 0: only if it is empty. Such an
                event travels alone.
            timeout: Seconds with all attempts, to a tenth; None means the client's.

        Raises:
            SessionNotFound: There is no such session.
            ServerSeqConflict: The session's last number is another. Nothing was written.
            InvalidRequest: A field is not valid, the event is too large, or its key is stored with other content.
        """
        return await self._begin(session_id, [event], expected_last_server_seq, timeout, in_batch=False)

    async def append_batch(
        self,
        session_id: int,
        events: Iterable[NewEvent],
        *,
        expected_last_server_seq: int | None = None,
        timeout: float | None = None,
    ) -> AppendedBatch:
        """Append events as neighbours, all or none, as `append` does. At most 1,000 of them, and 4 MiB of payloads."""
        batch = list(events)
        first, created_at, replayed = await self._begin(
            session_id, batch, expected_last_server_seq, timeout, in_batch=True
        )
        return AppendedBatch(first, first + len(batch) - 1, created_at, replayed)

    def _begin(
        self,
        session_id: int,
        events: Sequence[NewEvent],
        expected: int | None,
        timeout: float | None,
        *,
        in_batch: bool,
    ) -> "asyncio.Future[Acknowledged]":
        """Let events wait for their turn; return what will tell where they were stored."""
        if self._task is None or self._task.done():
            raise RuntimeError("the appender is not open; use it with: async with client.appender() as appender")
        if not self._outbox.knows(session_id) or expected is not None:  # otherwise it is known to be right
            message_of(pb.AppendEventsRequest, session_id=session_id, expected_last_server_seq=expected)
        messages = messages_of(events, in_batch=in_batch)
        give_up_at = self._loop.time() + (self._timeout if timeout is None else timeout)
        item = Item(events, expected, give_up_at, self._loop.create_future(), in_batch=in_batch)
        self._outbox.add(session_id, item, messages)
        if self._ticking is None:
            self._ticking = self._loop.call_later(_TICK, self._tick)
        return item.answer

    def _tick(self) -> None:
        """Fail those whose time is up, and drop what nobody waits for any more."""
        now = self._loop.time()
        for item in self._outbox.items():
            if item.give_up_at <= now:
                item.fail(self._trouble or DeadlineExceeded(_TOO_LATE))
        self._outbox.drop_unwanted()
        self._ticking = None if self._outbox.idle.is_set() else self._loop.call_later(_TICK, self._tick)

    async def _run(self) -> None:
        """Keep a stream while there is something to append."""
        try:
            while True:
                await self._outbox.to_send.wait()
                try:
                    await self._converse()
                except ServiceError as error:
                    await asyncio.sleep(self._after(error))
                    if _is_grpcs_own(error) and self._outbox.unanswered:
                        await self._send_first_alone()
        finally:
            if self._ticking is not None:
                self._ticking.cancel()
            self._fail_all(RuntimeError("the appender was closed before the service has answered"))

    async def _converse(self) -> None:
        """Send what is not answered, then what comes, and take the answers, until the stream ends.

        Raises:
            ServiceError: Why it has ended.
        """
        self._outbox.unsent = deque(self._outbox.unanswered)
        self._newly_sent.clear()
        with rpc_errors(writes=True):
            call = self._stub.AppendStream(metadata=call_metadata())
        sender = asyncio.create_task(self._send(call), name="appender-sender")
        try:
            while True:
                with rpc_errors(writes=True):
                    answer = await call.read()
                if not isinstance(answer, pb.AppendStreamResponse):
                    raise Unavailable("the service has ended the stream")
                self._trouble = None
                self._newly_sent.clear()
                self._backoff.reset()
                self._answered(answer)
        finally:
            sender.cancel()
            call.cancel()

    def _answered(self, answer: pb.AppendStreamResponse) -> None:
        self._outbox.answered(answer)
        self._careful = self._careful and bool(self._outbox.unsent)
        self._outbox.to_send.set()  # where one is sent at a time, it is the next one's turn

    async def _send_first_alone(self) -> None:
        """Find out in a call of its own what becomes of the first batch.

        Where a stream ends in the middle of sending a message, such as one that is too large, grpc hides the reason.
        """
        batch = self._outbox.unanswered[0]
        self._outbox.unsent = deque(islice(self._outbox.unanswered, 1, None))
        batch.mark(sent=True)
        try:
            with rpc_errors(writes=True):
                response = await self._stub.AppendEvents(
                    batch.message.request, metadata=call_metadata(), timeout=_ALONE
                )
        except TooLarge as error:
            self._outbox.refused(batch, error)
        except ServiceError:
            pass  # the next stream will tell
        else:
            number = batch.message.request_number
            self._answered(pb.AppendStreamResponse(request_number=number, response=response))

    async def _send(self, call: "_Call") -> None:
        # Whatever ends the stream is told to its reader.
        with suppress(grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError):
            outbox = self._outbox
            while True:
                outbox.to_send.clear()
                while outbox.unsent and not (self._careful and len(outbox.unanswered) > len(outbox.unsent)):
                    batch = outbox.unsent.popleft()
                    if not batch.sent:
                        if any(item.answer.done() for item in batch.items):
                            outbox.take_apart(batch)  # some have left, and were told that theirs is not stored
                            continue
                        batch.mark(sent=True)
                        self._newly_sent.append(batch)
                    await call.write(batch.message)
                await outbox.to_send.wait()

    def _after(self, error: ServiceError) -> float:
        """Decide what to do after a stream has ended; return the seconds to wait before the next one."""
        outbox = self._outbox
        if isinstance(error, Unavailable) and error.side_effects == "none" and not error.reason:
            # The service was not reached.
            for batch in self._newly_sent:
                batch.mark(sent=False)
        sent = len(outbox.unanswered) - len(outbox.unsent)
        if not _may_pass(error) and outbox.unanswered:
            first = outbox.unanswered[0]
            if sent <= 1 and isinstance(error, TooLarge):
                outbox.refused(first, error)
            elif sent <= 1:
                outbox.give_up(first, error)
            self._careful = True
        for batch in list(outbox.unanswered):
            if all(item.answer.done() for item in batch.items):
                outbox.give_up(batch)  # stored or not, as its callers were told; there is nobody to send it for
        self._trouble = error if outbox.unanswered else None
        if not outbox.unanswered:
            self._careful = False
            outbox.to_send.clear()
            return 0.0
        pause = self._backoff.next(error.retry_after)
        if pause is None:
            self._fail_all(error)
            return 0.0
        outbox.to_send.set()
        return pause

    def _fail_all(self, error: Exception) -> None:
        """Fail everything that waits or is on its way, and begin anew."""
        self._outbox.fail_all(error)
        self._careful = False
        self._backoff.reset()


def _may_pass(error: ServiceError) -> bool:
    """Tell whether another stream may fare better."""
    return error.is_retryable or _is_grpcs_own(error)


def _is_grpcs_own(error: ServiceError) -> bool:
    """Tell whether it is what grpc makes of some connections that are lost, and streams that have ended."""
    return isinstance(error, InternalError) and not error.reason


_TOO_LATE = "the service did not answer in time"
