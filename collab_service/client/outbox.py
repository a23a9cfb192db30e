"""What an `Appender` has to send: events that wait for their session's next batch, and batches until they are answered.

A batch is made when there is room on the way, of what has come until then. Events with keys of their callers never
travel with events that have none: of such a batch the service might know the one, and take the other for what is
stored behind it.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from enum import Enum

from collab_service.client.convert import event_to_message, events_to_messages, time_of
from collab_service.client.errors import InternalError, ServiceError, SessionNotFound, TooLarge, error_of_failure
from collab_service.client.values import Acknowledged, NewEvent
from collab_service.v1 import collab_service_pb2 as pb

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


class Company(Enum):
    """With what an item may travel."""

    KEYLESS = "with others that have no idempotency key; the first one is given one"
    KEYED = "with others of which every event has a key of its caller's"
    NONE = "alone"


class Item:
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
            self.company = Company.NONE
        else:
            self.company = Company.KEYED if self.keys else Company.KEYLESS
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


class Line:
    """What waits for one session, in order."""

    __slots__ = ("on_their_way", "session_id", "waiting")

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.waiting: deque[Item] = deque()
        self.on_their_way = 0

    @property
    def is_ready(self) -> bool:
        """Whether a batch can be made."""
        return bool(self.waiting) and self.on_their_way < _OF_ONE_SESSION


class Batch:
    """What travels together."""

    __slots__ = ("items", "line", "message", "sent", "size")

    def __init__(self, line: Line, items: list[Item], message: pb.AppendStreamRequest) -> None:
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


class Outbox:
    """What waits, by session and in order, and the batches on their way; what waits in memory is bounded by bytes."""

    def __init__(self, new_key: Callable[[], str]) -> None:
        self._new_key = new_key
        self._lines: dict[int, Line] = {}
        """Those with something that waits or is on its way."""
        self._ready: OrderedDict[int, Line] = OrderedDict()
        """The lines of which a batch can be made, in turns."""
        self._filling = False
        self._waiting_bytes = 0
        self._outside: deque[tuple[int, Item]] = deque()
        """What waits, with its session, until there is room for it."""
        self.unanswered: deque[Batch] = deque()
        self._unanswered_bytes = 0
        self.unsent: deque[Batch] = deque()
        """The last ones of them: those that have not been sent on this stream."""
        self._numbers = 0
        self._batch_events = _BATCH_EVENTS
        self.to_send = asyncio.Event()
        """Set when there may be something to send."""
        self.idle = asyncio.Event()
        """Set while nothing waits or is on its way."""
        self.idle.set()

    def add(self, session_id: int, item: Item, messages: Sequence[pb.NewEvent]) -> None:
        """Let an item wait for its turn, with the messages of its events if there is room for them."""
        if self._outside or not self._has_room(item):
            self._outside.append((session_id, item))
        else:
            item.messages = messages
            self._put(session_id, item)

    def knows(self, session_id: int) -> bool:
        """Tell whether something waits or is on its way for a session."""
        return session_id in self._lines

    def _has_room(self, item: Item) -> bool:
        return not self._waiting_bytes or self._waiting_bytes + item.size <= _WAITING_BYTES

    def _put(self, session_id: int, item: Item) -> None:
        line = self._lines.get(session_id)
        if line is None:
            line = self._lines[session_id] = Line(session_id)
            self.idle.clear()
        line.waiting.append(item)
        self._waiting_bytes += item.size
        self._fill_soon(line)

    def _make_room(self) -> None:
        """Let in what waits outside, the first one first, as far as there is room."""
        while self._outside:
            session_id, item = self._outside[0]
            if not item.answer.done():
                if not self._has_room(item):
                    return
                item.messages = messages_of(item.events, in_batch=item.in_batch)
                self._put(session_id, item)
            self._outside.popleft()

    def drop_unwanted(self) -> None:
        """Forget what waits and has an answer already, or whose caller has left."""
        for line in list(self._lines.values()):
            wanted = deque(item for item in line.waiting if not item.answer.done())
            if len(wanted) < len(line.waiting):
                self._waiting_bytes -= sum(item.size for item in line.waiting) - sum(item.size for item in wanted)
                line.waiting = wanted
                self._go_on_with(line)
        self._make_room()

    def items(self) -> Iterator[Item]:
        """Yield everything that waits or is on its way."""
        for batch in self.unanswered:
            yield from batch.items
        for line in self._lines.values():
            yield from line.waiting
        for _, item in self._outside:
            yield item

    def _fill_soon(self, line: Line) -> None:
        """Make batches at the next turn of the event loop, when everybody who is about to append has done so."""
        if line.is_ready:
            self._ready[line.session_id] = line
        if self._ready and not self._filling:
            self._filling = True
            asyncio.get_running_loop().call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        while self._ready and len(self.unanswered) < _ON_THEIR_WAY and self._unanswered_bytes < _ON_THEIR_WAY_BYTES:
            _, line = self._ready.popitem(last=False)
            if not line.is_ready:
                continue
            batch = self._batch_of(line)
            line.on_their_way += 1
            self.unanswered.append(batch)
            self._unanswered_bytes += batch.size
            self.unsent.append(batch)
            self.to_send.set()
            if line.is_ready:
                self._ready[line.session_id] = line
        self._make_room()

    def _batch_of(self, line: Line) -> Batch:
        """Make a batch of what waits first in a line."""
        self._numbers += 1
        message = pb.AppendStreamRequest(request_number=self._numbers)
        request = message.request
        request.session_id = line.session_id
        items: list[Item] = []
        keys: set[str] = set()
        size = 0
        left = len(line.waiting)
        if not line.on_their_way and left >= _WORTH_HALVING:
            left = (left + 1) // 2
        while len(items) < left:
            item = line.waiting[0]
            size += item.size
            if items and (
                item.company is Company.NONE
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
        return Batch(line, items, message)

    def answered(self, answer: pb.AppendStreamResponse) -> None:
        """Tell everybody in the first batch that was not answered what became of it.

        Raises:
            InternalError: It is not the answer to that batch.
        """
        batch = self.unanswered[0] if len(self.unanswered) > len(self.unsent) else None
        if batch is None or answer.request_number != batch.message.request_number:
            raise InternalError("the service has answered what was not asked", side_effects="unknown")
        self._let_go_of(batch)
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

    def refused(self, batch: Batch, error: ServiceError) -> None:
        """Take note that a batch on its way was refused as a whole: nothing of it is stored."""
        self._let_go_of(batch)
        self._refused(batch, error)
        self._go_on_with(batch.line)

    def _refused(self, batch: Batch, error: ServiceError) -> None:
        """Tell the caller; where there are several, let each one's events travel alone, since some may be good."""
        batch.mark(sent=False)  # nothing of it is stored
        if len(batch.items) == 1 or isinstance(error, SessionNotFound):
            _fail(batch.items, error)
            return
        if isinstance(error, TooLarge):
            self._batch_events = max(len(batch.message.request.events) // 2, 1)
        for item in batch.items:
            item.company = Company.NONE
        self._put_back(batch)

    def take_apart(self, batch: Batch) -> None:
        """Let what was to be sent, and what was to come behind it in its session, wait again in its order."""
        behind = [other for other in self.unsent if other.line is batch.line]
        self.unsent = deque(other for other in self.unsent if other.line is not batch.line)
        for unsent in reversed([batch, *behind]):
            self._let_go_of(unsent)
            self._put_back(unsent)
        self._go_on_with(batch.line)

    def _put_back(self, batch: Batch) -> None:
        for item in reversed(batch.items):
            if not item.answer.done():
                batch.line.waiting.appendleft(item)
                self._waiting_bytes += item.size

    def _let_go_of(self, batch: Batch) -> None:
        self.unanswered.remove(batch)  # mostly the first one
        self._unanswered_bytes -= batch.size
        batch.line.on_their_way -= 1

    def _go_on_with(self, line: Line) -> None:
        """Make the next batch after something has left a line; forget the line when it is empty."""
        if not line.waiting and not line.on_their_way:
            self._lines.pop(line.session_id, None)
            if not self._lines:
                self.idle.set()
        self._fill_soon(line)

    def give_up(self, batch: Batch, error: ServiceError | None = None) -> None:
        """Let go of a batch on its way, and tell an error to those who have no answer, if one is given."""
        self._let_go_of(batch)
        if error is not None:
            _fail(batch.items, error)
        self._go_on_with(batch.line)

    def fail_all(self, error: Exception) -> None:
        """Fail everything that waits or is on its way."""
        _fail(list(self.items()), error)
        self._lines.clear()
        self._ready.clear()
        self.unanswered.clear()
        self.unsent.clear()
        self._waiting_bytes = self._unanswered_bytes = 0
        self.to_send.clear()
        self._outside.clear()
        self.idle.set()


def messages_of(events: Sequence[NewEvent], *, in_batch: bool) -> Sequence[pb.NewEvent]:
    """Return events as they are sent; raises `InvalidRequest` as `event_to_message` does."""
    return events_to_messages(events) if in_batch else [event_to_message(events[0])]


def _fail(items: Iterable[Item], error: Exception) -> None:
    for item in items:
        item.fail(error)
