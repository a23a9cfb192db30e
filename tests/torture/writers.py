"""Who writes: in every way that the service has, without believing anything but what is answered."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc

from collab_service.client import (
    Acknowledged,
    Appended,
    AppendedBatch,
    Appender,
    CollabClient,
    RetryPolicy,
    ServerSeqConflict,
    ServiceError,
)
from collab_service.client.convert import event_to_message, events_to_messages, time_of
from collab_service.client.errors import error_of_failure
from collab_service.client.reading import rpc_errors
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.torture.history import Append, Delete, History, Outcome, Sent

if TYPE_CHECKING:  # there is no such class when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_ATTEMPT = 8.0
"""Seconds for one attempt."""
_ATTEMPTS = 12
"""Attempts with one key."""
_WINDOW = 12
"""Requests of a stream on their way at once."""
_PAYLOAD = '{"text":"%s"}'
_LARGEST_BATCH = 8
_QUICK = RetryPolicy(first_pause=0.05, longest_pause=0.5)


class Sessions:
    """The sessions of a run; some are deleted on the way, and others take their place."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.live = list(ids)
        """Those to write into."""
        self.all = list(ids)
        """Those that there have ever been."""
        self.heads: dict[int, int] = {}
        """The last number of each that anybody has been told of."""
        self.on_new: Callable[[int], None] = lambda _: None
        """Called with each that takes another's place."""

    def replace(self, old: int, new: int) -> None:
        """Write into another session instead."""
        self.live[self.live.index(old)] = new
        self.all.append(new)
        self.on_new(new)

    def saw(self, session: int, number: int) -> None:
        """Take note of a number."""
        self.heads[session] = max(number, self.heads.get(session, 0))


@asynccontextmanager
async def raw_stub(address: str) -> AsyncIterator["CollabServiceAsyncStub"]:
    """Open a connection of its own, on which a call is one attempt."""
    async with grpc.aio.insecure_channel(address, _OPTIONS) as channel:
        stub: CollabServiceAsyncStub = CollabServiceStub(channel)
        yield stub


def outcome_of(error: ServiceError) -> tuple[Outcome, str]:
    """Return what an error says has become of a call, and why."""
    return ("refused" if error.side_effects == "none" else "unknown"), error.reason or type(error).__name__


class Writer:
    """What all who write have: a name, chances, and where they note what they do."""

    def __init__(self, name: str, history: History, sessions: Sessions, stop: asyncio.Event) -> None:
        self.name = name
        self.random = random.Random(f"{history.seed}/{name}")
        self.history = history
        self.sessions = sessions
        self.stop = stop
        self._marks = count(1)

    def event(self, *, key: bool) -> Sent:
        """Make up an event like no other."""
        mark = f"{self.name}/{next(self._marks)}"
        text = "x" * self.random.choice((0, 10, 200, 2_000))
        payload: str | bytes = _PAYLOAD % text if self.random.random() < 0.8 else text.encode()
        return Sent(mark, payload, f"key/{mark}" if key else None)

    def events(self, *, keys: str, at_most: int = _LARGEST_BATCH) -> list[Sent]:
        """Make up a batch of which `all`, the `first` or `none` of the events have a key."""
        number = self.random.randint(1, at_most)
        return [self.event(key=keys == "all" or (keys == "first" and at == 0)) for at in range(number)]

    def session(self) -> int:
        """Choose a session."""
        return self.random.choice(self.sessions.live)

    def condition(self, session: int) -> int | None:
        """Choose a number to stand behind, or none."""
        head = self.sessions.heads.get(session)
        return head if head is not None and self.random.random() < 0.3 else None

    async def pause(self, most: float = 0.05) -> None:
        """Let others write."""
        await asyncio.sleep(self.random.uniform(0, most))

    def stored(self, call: Append, first: int, created_at: Any, *, replayed: bool) -> None:
        """Note that a call was answered with OK."""
        call.ended = self.history.now()
        call.outcome, call.first, call.replayed = "stored", first, replayed
        call.created_at = created_at.isoformat()
        self.sessions.saw(call.session, first + len(call.events) - 1)

    def failed(self, call: Append, error: ServiceError) -> None:
        """Note that a call has failed."""
        call.ended = self.history.now()
        call.outcome, call.reason = outcome_of(error)
        if isinstance(error, ServerSeqConflict):
            self.sessions.saw(call.session, error.actual)


class Unary(Writer):
    """One call for an event or a batch, each attempt on its own; what has a key is sent again until it is answered."""

    async def run(self, addresses: Sequence[str], *, batches: bool) -> None:
        """Write until told to stop, through any of these addresses."""
        async with raw_stub(addresses[0]) as first, raw_stub(addresses[-1]) as second:
            while not self.stop.is_set():
                await self.pause()
                keys = self.random.choice(("all", "first", "none"))
                events = self.events(keys=keys, at_most=_LARGEST_BATCH if batches else 1)
                session = self.session()
                expected = self.condition(session)
                for _ in range(_ATTEMPTS):
                    call = self.history.append(session, self.name, events, expected=expected)
                    await self._attempt(self.random.choice((first, second)), call, batch=batches)
                    # Now and then it asks again what it knows, to be told the same.
                    is_enough = call.outcome == "stored" and self.random.random() < 0.9
                    if events[0].key is None or is_enough or call.reason in _FINAL:
                        break
                    await self.pause(0.5)

    async def _attempt(self, stub: "CollabServiceAsyncStub", call: Append, *, batch: bool) -> None:
        events = [sent.event() for sent in call.events]
        target: dict[str, Any] = {"session_id": call.session, "expected_last_server_seq": call.expected}
        try:
            with rpc_errors(writes=True):
                if batch:
                    request = pb.AppendEventsRequest(events=events_to_messages(events), **target)
                    many = await stub.AppendEvents(request, timeout=_ATTEMPT)
                else:
                    one = await stub.AppendEvent(
                        pb.AppendEventRequest(event=event_to_message(events[0]), **target), timeout=_ATTEMPT
                    )
        except ServiceError as error:
            self.failed(call, error)
            return
        if batch:
            self.stored(call, many.first_server_seq, time_of(many.create_time), replayed=many.replayed)
        else:
            event = one.event
            self.stored(call, event.server_seq, time_of(event.create_time), replayed=one.replayed)
            call.id, call.chain_hash = event.id, event.chain_hash.hex()


_FINAL = ("SERVER_SEQ_CONFLICT", "SESSION_NOT_FOUND", "IDEMPOTENCY_KEY_REUSED", "INTERNAL")
"""Reasons for which sending again makes no sense."""


class Streaming(Writer):
    """One `AppendStream` after the other; what was not answered is sent again in its order, if it has a key."""

    async def run(self, address: str) -> None:
        """Write until told to stop."""
        unanswered: deque[Append] = deque()
        async with raw_stub(address) as stub:
            for number in count(1):
                again = [call for call in unanswered if call.events[0].key is not None]
                unanswered.clear()
                if self.stop.is_set() and not again:
                    return
                await self._converse(stub, f"{self.name}#{number}", again, unanswered)
                await self.pause(0.3)

    async def _converse(
        self, stub: "CollabServiceAsyncStub", stream: str, again: Sequence[Append], unanswered: deque[Append]
    ) -> None:
        """Write into one stream until it ends, or until it has been used for a while."""
        call = stub.AppendStream(timeout=2 * _ATTEMPT)
        room = asyncio.Semaphore(_WINDOW)
        left = self.random.randint(20, 400)

        async def send() -> None:
            for old in again:
                await self._send(call, self._request(stream, unanswered, old), room)
            for _ in range(left):
                if self.stop.is_set():
                    break
                await self.pause(0.02)
                await self._send(call, self._request(stream, unanswered), room)
            await call.done_writing()

        sending = asyncio.create_task(send(), name=f"send-{stream}")
        try:
            with rpc_errors(writes=True):
                while isinstance(answer := await call.read(), pb.AppendStreamResponse):
                    self._answered(unanswered, answer)
                    room.release()
        except ServiceError as error:
            for entry in unanswered:
                entry.ended, entry.reason = self.history.now(), outcome_of(error)[1]
        finally:
            sending.cancel()
            call.cancel()
            await asyncio.gather(sending, return_exceptions=True)  # whatever has ended the stream is told to its reader

    def _request(self, stream: str, unanswered: deque[Append], old: Append | None = None) -> Append:
        if old is None:
            session = self.session()
            events = self.events(keys=self.random.choice(("all", "first", "none")))
            expected = self.condition(session)
        else:
            session, events, expected = old.session, list(old.events), old.expected
        entry = self.history.append(session, self.name, events, expected=expected, stream=stream)
        unanswered.append(entry)
        return entry

    async def _send(
        self,
        call: "grpc.aio.StreamStreamCall[pb.AppendStreamRequest, pb.AppendStreamResponse]",
        entry: Append,
        room: asyncio.Semaphore,
    ) -> None:
        await room.acquire()
        request = pb.AppendEventsRequest(
            session_id=entry.session,
            events=events_to_messages([sent.event() for sent in entry.events]),
            expected_last_server_seq=entry.expected,
        )
        await call.write(pb.AppendStreamRequest(request_number=entry.number, request=request))

    def _answered(self, unanswered: deque[Append], answer: pb.AppendStreamResponse) -> None:
        entry = unanswered.popleft()
        if entry.number != answer.request_number:
            raise AssertionError(f"request {answer.request_number} is answered before {entry.number}")
        if answer.HasField("response"):
            response = answer.response
            self.stored(entry, response.first_server_seq, time_of(response.create_time), replayed=response.replayed)
        else:
            self.failed(entry, error_of_failure(answer.failure))


class Calling(Writer):
    """The client: it sends again by itself, and what it answers in the end is what counts."""

    async def run(self, address: str) -> None:
        """Write events and batches in turn, one call at a time, until told to stop."""
        async with _client(address) as client:
            while not self.stop.is_set():
                await self.pause()
                session = self.session()
                events = self.events(keys=self.random.choice(("all", "first", "none")))
                if self.random.random() < 0.5:
                    del events[1:]
                expected = self.condition(session)
                call = self.history.append(session, self.name, events, expected=expected, client=True)
                new = [sent.event() for sent in events]
                if len(new) == 1:
                    await self._noted(call, client.append(session, new[0], expected_last_server_seq=expected))
                else:
                    await self._noted(call, client.append_batch(session, new, expected_last_server_seq=expected))

    async def _noted(self, call: Append, answer: Awaitable[Appended | AppendedBatch | Acknowledged]) -> None:
        try:
            got = await answer
        except ServiceError as error:
            self.failed(call, error)
            return
        if isinstance(got, Appended):
            self.stored(call, got.event.server_seq, got.event.created_at, replayed=got.replayed)
            call.id, call.chain_hash = got.event.id, got.event.chain_hash.hex()
        elif isinstance(got, AppendedBatch):
            self.stored(call, got.first_server_seq, got.created_at, replayed=got.replayed)
        else:
            self.stored(call, got.server_seq, got.created_at, replayed=got.replayed)


class Appending(Calling):
    """The client's appender, with several coroutines that each wait for their own acknowledgement."""

    async def run(self, address: str, coroutines: int = 6) -> None:
        """Write until told to stop."""
        async with _client(address) as client, client.appender() as appender, asyncio.TaskGroup() as tasks:
            for _ in range(coroutines):
                tasks.create_task(self._write(appender), name=f"write-{self.name}")

    async def _write(self, appender: Appender) -> None:
        while not self.stop.is_set():
            await self.pause()
            session = self.session()
            batch = self.random.random() < 0.2
            keys = self.random.choice(("all", "none", "none"))
            events = self.events(keys=keys, at_most=_LARGEST_BATCH if batch else 1)
            expected = self.condition(session)
            call = self.history.append(session, self.name, events, expected=expected, client=True)
            new = [sent.event() for sent in events]
            if batch:
                await self._noted(call, appender.append_batch(session, new, expected_last_server_seq=expected))
            else:
                await self._noted(call, appender.append(session, new[0], expected_last_server_seq=expected))


class Deleting(Writer):
    """Deletes the last session now and then, while everybody writes into it, and puts a new one in its place."""

    async def run(self, address: str) -> None:
        """Delete until told to stop."""
        async with _client(address) as client, raw_stub(address) as stub:
            while not self.stop.is_set():
                await self._wait(self.random.uniform(2, 6))
                old = self.sessions.live[-1]
                with suppress(ServiceError):
                    new, _ = await client.create_session()
                    self.sessions.replace(old, new.id)
                    await self._delete(stub, old)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    async def _delete(self, stub: "CollabServiceAsyncStub", session: int) -> None:
        delete = Delete(len(self.history.entries), session, self.history.now())
        self.history.entries.append(delete)
        try:
            with rpc_errors(writes=True):
                await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session), timeout=_ATTEMPT)
            delete.outcome = "stored"
        except ServiceError as error:
            delete.outcome, delete.reason = outcome_of(error)
        delete.ended = self.history.now()


def _client(address: str) -> CollabClient:
    return CollabClient(address, retry=_QUICK, timeout=20.0, options=[("grpc.use_local_subchannel_pool", 1)])
