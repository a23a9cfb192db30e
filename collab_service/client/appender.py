"""Appends of any number of coroutines over one stream, each with its own acknowledgement.

A call of its own for every event costs ten times what the event costs. So events that wait for the same session travel
together as one batch, and several batches are on their way at once. A batch is made when there is room on the way, of
what has come until then: a lone event leaves at once, and the busier it gets the larger batches are.

When the stream is cut, nobody knows what became of the batches that were not answered. They are sent again, unchanged
and in their order; each has an idempotency key, so that none is stored twice. Events with keys of their callers never
travel with events that have none: of such a batch the service might know the one, and take the other for what is
stored behind it.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Self

import grpc

from collab_service.client.convert import event_to_message, events_to_messages, message_of, time_of
from collab_service.client.errors import (
    DeadlineExceeded,
    InternalError,
    ServiceError,
    SessionNotFound,
    TooLarge,
    Unavailable,
    error_of_failure,
)
from collab_service.client.reading import rpc_errors
from collab_service.client.request_id import call_metadata
from collab_service.client.retry import Backoff, RetryPolicy
from collab_service.client.values import Acknowledged, AppendedBatch, NewEvent
from collab_service.v1 import collab_service_pb2 as pb

if TYPE_CHECKING:  # there are no such classes when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

    _Call = grpc.aio.StreamStreamCall[pb.AppendStreamRequest, pb.AppendStreamResponse]

_BATCH_EVENTS, _BATCH_BYTES = 500, 512 * 1024
"""What travels together at most, unless one caller's own batch is larger."""
_ON_THEIR_WAY, _ON_THEIR_WAY_BYTES = 64, 8 * 1024 * 1024
"""Batches on their way at once at most, and their bytes, of which one batch may have more."""
_OF_ONE_SESSION = 2
"""Batches of one session on their way at once: one is made while the other is written."""
_WORTH_HALVING = 16
"""Items from which on half of them are sent, and then the rest, rather than all together and then nothing."""
_WAITING_BYTES = 16 * 1024 * 1024
"""Bytes of events that wait to be sent; further ones wait as their callers gave them."""
_EVENT_BYTES = 128
"""What an event weighs besides its payload, roughly."""
_ALONE = 10.0
"""Seconds for a batch that is sent in a call of its own."""
_TICK = 0.1
"""Seconds between looks for callers whose time is up."""


class _Company(Enum):
    """With what an item may travel."""

    KEYLESS = "with others that have no idempotency key; the first one is given one"
    KEYED = "with others of which every event has a key of its caller's"
    NONE = "alone"


class _Item:
    """What one caller wants to append."""

    __slots__ = (
        "answer",
        "company",
        "events",
        "expected",
        "give_up_at",
        "in_batch",
        "keys",
        "messages",
        "sent",
        "size",
    )

    def __init__(
        self,
        events: Sequence[NewEvent],
        expected: int | None,
        give_up_at: float,
        answer: "asyncio.Future[Acknowledged]",
        *,
        in_batch: bool,
    ) -> None:
        self.events = events
        self.in_batch = in_batch
        self.expected = expected
        self.give_up_at = give_up_at
        self.answer = answer
        self.size = sum([_EVENT_BYTES + len(event.payload) for event in events])
        """Bytes, roughly."""
        self.keys = {event.idempotency_key for event in events if event.idempotency_key is not None}
        if expected is not None or not events or 0 < len(self.keys) < len(events):
            self.company = _Company.NONE
        else:
            self.company = _Company.KEYED if self.keys else _Company.KEYLESS
        self.messages: Sequence[pb.NewEvent] = ()
        """The events as they are sent, once there is room for them."""
        self.sent = False
        """Whether it may be stored, for all that is known."""

    def fail(self, error: Exception) -> None:
        """Answer with an error of its own, unless the caller has an answer or has left."""
        if not self.answer.done():
            own = copy(error)
            if self.sent and isinstance(own, ServiceError):
                own.side_effects = "unknown"
            self.answer.set_exception(own)


class _Line:
    """What waits for one session, in order."""

    __slots__ = ("on_their_way", "session_id", "waiting")

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.waiting: deque[_Item] = deque()
        self.on_their_way = 0

    @property
    def is_ready(self) -> bool:
        """Whether a batch can be made."""
        return bool(self.waiting) and self.on_their_way < _OF_ONE_SESSION


class _Batch:
    """What travels together."""

    __slots__ = ("items", "line", "message", "sent", "size")

    def __init__(self, line: _Line, items: list[_Item], message: pb.AppendStreamRequest) -> None:
        self.line = line
        self.items = items
        self.message = message
        self.size = message.ByteSize()
        self.sent = False
        """Whether it has been sent; from then on it stays as it is."""

    def mark(self, *, sent: bool) -> None:
        """Take note of whether it may be stored."""
        self.sent = sent
        for item in self.items:
            item.sent = sent


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
        self._new_key = new_key
        self._backoff = Backoff(retry)
        self._lines: dict[int, _Line] = {}
        """Those with something that waits or is on its way."""
        self._ready: OrderedDict[int, _Line] = OrderedDict()
        """The lines of which a batch can be made, in turns."""
        self._filling = False
        self._waiting_bytes = 0
        self._outside: deque[tuple[int, _Item]] = deque()
        """What waits, with its session, until there is room for it."""
        self._unanswered: deque[_Batch] = deque()
        self._unanswered_bytes = 0
        self._unsent: deque[_Batch] = deque()
        """The last ones of them: those that have not been sent on this stream."""
        self._newly_sent: list[_Batch] = []
        """Those that were sent on this stream for the first time."""
        self._numbers = 0
        self._batch_events = _BATCH_EVENTS
        self._careful = False
        """Whether one batch is sent at a time, since one of those that were not answered has ended the stream."""
        self._to_send = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
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
                await self._idle.wait()
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
        if session_id not in self._lines or expected is not None:  # otherwise it is known to be right
            message_of(pb.AppendEventsRequest, session_id=session_id, expected_last_server_seq=expected)
        messages = _messages_of(events, in_batch=in_batch)
        give_up_at = self._loop.time() + (self._timeout if timeout is None else timeout)
        item = _Item(events, expected, give_up_at, self._loop.create_future(), in_batch=in_batch)
        if self._outside or not self._has_room(item):
            self._outside.append((session_id, item))
        else:
            item.messages = messages
            self._put(session_id, item)
        return item.answer

    def _has_room(self, item: _Item) -> bool:
        return not self._waiting_bytes or self._waiting_bytes + item.size <= _WAITING_BYTES

    def _put(self, session_id: int, item: _Item) -> None:
        line = self._lines.get(session_id)
        if line is None:
            line = self._lines[session_id] = _Line(session_id)
            self._idle.clear()
        line.waiting.append(item)
        self._waiting_bytes += item.size
        self._fill_soon(line)
        if self._ticking is None:
            self._ticking = self._loop.call_later(_TICK, self._tick)

    def _make_room(self) -> None:
        """Let in what waits outside, the first one first, as far as there is room."""
        while self._outside:
            session_id, item = self._outside[0]
            if not item.answer.done():
                if not self._has_room(item):
                    return
                item.messages = _messages_of(item.events, in_batch=item.in_batch)
                self._put(session_id, item)
            self._outside.popleft()

    def _tick(self) -> None:
        """Fail those whose time is up, and drop what nobody waits for any more."""
        now = self._loop.time()
        for item in self._items():
            if item.give_up_at <= now:
                item.fail(self._trouble or DeadlineExceeded(_TOO_LATE))
        for line in list(self._lines.values()):
            wanted = deque(item for item in line.waiting if not item.answer.done())
            if len(wanted) < len(line.waiting):
                self._waiting_bytes -= sum(item.size for item in line.waiting) - sum(item.size for item in wanted)
                line.waiting = wanted
                self._go_on_with(line)
        self._make_room()
        self._ticking = None if self._idle.is_set() else self._loop.call_later(_TICK, self._tick)

    def _items(self) -> Iterator[_Item]:
        for batch in self._unanswered:
            yield from batch.items
        for line in self._lines.values():
            yield from line.waiting
        for _, item in self._outside:
            yield item

    # Batches: made, answered, taken apart.

    def _fill_soon(self, line: _Line) -> None:
        """Make batches at the next turn of the event loop, when everybody who is about to append has done so."""
        if line.is_ready:
            self._ready[line.session_id] = line
        if self._ready and not self._filling:
            self._filling = True
            self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        while self._ready and len(self._unanswered) < _ON_THEIR_WAY and self._unanswered_bytes < _ON_THEIR_WAY_BYTES:
            _, line = self._ready.popitem(last=False)
            if not line.is_ready:
                continue
            batch = self._batch_of(line)
            line.on_their_way += 1
            self._unanswered.append(batch)
            self._unanswered_bytes += batch.size
            self._unsent.append(batch)
            self._to_send.set()
            if line.is_ready:
                self._ready[line.session_id] = line
        self._make_room()

    def _batch_of(self, line: _Line) -> _Batch:
        """Make a batch of what waits first in a line."""
        self._numbers += 1
        message = pb.AppendStreamRequest(request_number=self._numbers)
        request = message.request
        request.session_id = line.session_id
        items: list[_Item] = []
        keys: set[str] = set()
        size = 0
        left = len(line.waiting)
        if not line.on_their_way and left >= _WORTH_HALVING:
            left = (left + 1) // 2
        while len(items) < left:
            item = line.waiting[0]
            size += item.size
            if items and (
                item.company is _Company.NONE
                or item.company is not items[0].company
                or len(request.events) + len(item.messages) > self._batch_events
                or size > _BATCH_BYTES
                or not keys.isdisjoint(item.keys)
            ):
                break
            keys |= item.keys
            items.append(line.waiting.popleft())
            self._waiting_bytes -= item.size
            request.events.extend(item.messages)
        if items[0].expected is not None:
            request.expected_last_server_seq = items[0].expected
        if not keys and request.events:
            request.events[0].idempotency_key = self._new_key()
        return _Batch(line, items, message)

    def _answered(self, answer: pb.AppendStreamResponse) -> None:
        """Tell everybody in the first batch that was not answered what became of it."""
        batch = self._unanswered[0] if len(self._unanswered) > len(self._unsent) else None
        if batch is None or answer.request_number != batch.message.request_number:
            raise InternalError("the service has answered what was not asked", side_effects="unknown")
        self._let_go_of(batch)
        self._careful = self._careful and bool(self._unsent)
        self._to_send.set()  # where one is sent at a time, it is the next one's turn
        if answer.HasField("failure"):
            self._refused(batch, error_of_failure(answer.failure))
        else:
            number, created_at = answer.response.first_server_seq, time_of(answer.response.create_time)
            for item in batch.items:
                if not item.answer.done():
                    # With a key of our own, what an earlier stream has stored is no replay to the caller.
                    replayed = answer.response.replayed and bool(item.keys)
                    item.answer.set_result(Acknowledged(number, created_at, replayed))
                number += len(item.messages)
        self._go_on_with(batch.line)

    def _refused(self, batch: _Batch, error: ServiceError) -> None:
        """Tell the caller; where there are several, let each one's events travel alone, since some may be good."""
        batch.mark(sent=False)  # nothing of it is stored
        if len(batch.items) == 1 or isinstance(error, SessionNotFound):
            _fail(batch.items, error)
            return
        if isinstance(error, TooLarge):
            self._batch_events = max(len(batch.message.request.events) // 2, 1)
        for item in batch.items:
            item.company = _Company.NONE
        self._put_back(batch)

    def _take_apart(self, batch: _Batch) -> None:
        """Let what was to be sent, and what was to come behind it in its session, wait again in its order."""
        behind = [other for other in self._unsent if other.line is batch.line]
        self._unsent = deque(other for other in self._unsent if other.line is not batch.line)
        for unsent in reversed([batch, *behind]):
            self._let_go_of(unsent)
            self._put_back(unsent)
        self._go_on_with(batch.line)

    def _put_back(self, batch: _Batch) -> None:
        for item in reversed(batch.items):
            if not item.answer.done():
                batch.line.waiting.appendleft(item)
                self._waiting_bytes += item.size

    def _let_go_of(self, batch: _Batch) -> None:
        self._unanswered.remove(batch)  # mostly the first one
        self._unanswered_bytes -= batch.size
        batch.line.on_their_way -= 1

    def _go_on_with(self, line: _Line) -> None:
        """Make the next batch after something has left a line; forget the line when it is empty."""
        if not line.waiting and not line.on_their_way:
            self._lines.pop(line.session_id, None)
            if not self._lines:
                self._idle.set()
        self._fill_soon(line)

    # The stream.

    async def _run(self) -> None:
        """Keep a stream while there is something to append."""
        try:
            while True:
                await self._to_send.wait()
                try:
                    await self._converse()
                except ServiceError as error:
                    await asyncio.sleep(self._after(error))
                    if _is_grpcs_own(error) and self._unanswered:
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
        self._unsent = deque(self._unanswered)
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

    async def _send_first_alone(self) -> None:
        """Find out in a call of its own what becomes of the first batch.

        Where a stream ends in the middle of sending a message, such as one that is too large, grpc hides the reason.
        """
        batch = self._unanswered[0]
        self._unsent = deque(islice(self._unanswered, 1, None))
        batch.mark(sent=True)
        try:
            with rpc_errors(writes=True):
                response = await self._stub.AppendEvents(
                    batch.message.request, metadata=call_metadata(), timeout=_ALONE
                )
        except TooLarge as error:
            self._let_go_of(batch)
            self._refused(batch, error)
            self._go_on_with(batch.line)
        except ServiceError:
            pass  # the next stream will tell
        else:
            number = batch.message.request_number
            self._answered(pb.AppendStreamResponse(request_number=number, response=response))

    async def _send(self, call: "_Call") -> None:
        # Whatever ends the stream is told to its reader.
        with suppress(grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError):
            while True:
                self._to_send.clear()
                while self._unsent and not (self._careful and len(self._unanswered) > len(self._unsent)):
                    batch = self._unsent.popleft()
                    if not batch.sent:
                        if any(item.answer.done() for item in batch.items):
                            self._take_apart(batch)  # some have left, and were told that theirs is not stored
                            continue
                        batch.mark(sent=True)
                        self._newly_sent.append(batch)
                    await call.write(batch.message)
                await self._to_send.wait()

    def _after(self, error: ServiceError) -> float:
        """Decide what to do after a stream has ended; return the seconds to wait before the next one."""
        if isinstance(error, Unavailable) and error.side_effects == "none" and not error.reason:
            # The service was not reached.
            for batch in self._newly_sent:
                batch.mark(sent=False)
        sent = len(self._unanswered) - len(self._unsent)
        if not _may_pass(error) and self._unanswered:
            first = self._unanswered[0]
            if sent <= 1 and isinstance(error, TooLarge):
                self._let_go_of(first)
                self._refused(first, error)
                self._go_on_with(first.line)
            elif sent <= 1:
                self._give_up(first, error)
            self._careful = True
        for batch in list(self._unanswered):
            if all(item.answer.done() for item in batch.items):
                self._give_up(batch)  # stored or not, as its callers were told; there is nobody to send it for
        self._trouble = error if self._unanswered else None
        if not self._unanswered:
            self._careful = False
            self._to_send.clear()
            return 0.0
        pause = self._backoff.next(error.retry_after)
        if pause is None:
            self._fail_all(error)
            return 0.0
        self._to_send.set()
        return pause

    def _give_up(self, batch: _Batch, error: ServiceError | None = None) -> None:
        self._let_go_of(batch)
        if error is not None:
            _fail(batch.items, error)
        self._go_on_with(batch.line)

    def _fail_all(self, error: Exception) -> None:
        """Fail everything that waits or is on its way, and begin anew."""
        _fail(list(self._items()), error)
        self._lines.clear()
        self._ready.clear()
        self._unanswered.clear()
        self._unsent.clear()
        self._waiting_bytes = self._unanswered_bytes = 0
        self._careful = False
        self._backoff.reset()
        self._to_send.clear()
        self._outside.clear()
        self._idle.set()


def _messages_of(events: Sequence[NewEvent], *, in_batch: bool) -> Sequence[pb.NewEvent]:
    """Return events as they are sent; raises `InvalidRequest` as `event_to_message` does."""
    return events_to_messages(events) if in_batch else [event_to_message(events[0])]


def _may_pass(error: ServiceError) -> bool:
    """Tell whether another stream may fare better."""
    return error.is_retryable or _is_grpcs_own(error)


def _is_grpcs_own(error: ServiceError) -> bool:
    """Tell whether it is what grpc makes of some connections that are lost, and streams that have ended."""
    return isinstance(error, InternalError) and not error.reason


_TOO_LATE = "the service did not answer in time"


def _fail(items: Iterable[_Item], error: Exception) -> None:
    for item in items:
        item.fail(error)
