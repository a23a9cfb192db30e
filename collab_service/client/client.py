"""The client: one object for one service, for any number of coroutines."""

import asyncio
import math
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collab_service.client.appender import Appender
from collab_service.client.convert import (
    event_of,
    event_to_message,
    events_to_messages,
    message_of,
    session_of,
    time_of,
)
from collab_service.client.errors import ServiceError, SessionNotFound
from collab_service.client.reading import Cursor, pages, rpc_errors
from collab_service.client.request_id import call_metadata
from collab_service.client.retry import SHORTEST_ATTEMPT, Backoff, RetryPolicy
from collab_service.client.values import (
    Appended,
    AppendedBatch,
    CreatedSession,
    Event,
    EventPage,
    NewEvent,
    Session,
    SessionPage,
)
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

if TYPE_CHECKING:  # there is no such class when the program runs
    from collab_service.v1.collab_service_pb2_grpc import CollabServiceAsyncStub

DEFAULT_TARGET = "127.0.0.1:50051"
END: Final = -1
"""For `follow`: begin at the session's end, with what is appended from now on."""

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", -1),  # a page is about 1 MiB, and larger when one event is
    # A service that vanishes without a word is noticed within a quarter of a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # While it is away grpc itself waits between its attempts to connect: as much as we do, not up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # is how long an attempt may take, whatever it is called
    # Of several addresses a client takes any one, and the next when that is gone.
    ("grpc.service_config", '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'),
)

_LONGEST_TIMEOUT = 1e9
"""Seconds, some thirty years; where it is more (math.inf, say) grpc never sends the call, and never fails."""

Response = TypeVar("Response")


class CollabClient:
    """A client of collab-service. Use it as a context manager, and share it: calls run side by side on one connection.

    Every call tries again by itself while that may help and cannot do harm, until its `timeout` has passed; then it
    raises the `ServiceError` that it met last. A call that was cut half-way may have taken effect. So an append is
    given an idempotency key, with which it is stored once however often it is sent, unless `auto_key=False`; other
    calls that write and cannot be repeated safely are not sent again. An error's `side_effects` speaks for all
    attempts.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  # it is frozen
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Prepare; entering the context opens the channel, and the first call connects.

        Args:
            target: `HOST:PORT`, or any other name that grpc resolves (https://grpc.github.io/grpc/core/md_doc_naming.html),
                such as `ipv4:10.0.0.1:50051,10.0.0.2:50051` for replicas, of which one is used while it answers.
            timeout: Seconds for a call with all its attempts, unless the call says otherwise.
            retry: The pauses between attempts.
            credentials: For TLS; None connects in the clear.
            options: More channel arguments of grpc; they win over the client's own.
        """
        self.target = target
        self.timeout = timeout
        self._retry = retry
        self._credentials = credentials
        self._options = list({**dict(_OPTIONS), **dict(options)}.items())  # of equal names grpc takes the first
        self._channel: grpc.aio.Channel | None = None
        self._stub: CollabServiceAsyncStub | None = None
        self._key_prefix = ""
        self._key_numbers = count(1)

    async def __aenter__(self) -> Self:
        """Open the channel."""
        if self._channel is not None:
            raise RuntimeError("the client is open already")
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self.target, self._options)
        else:
            self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        self._stub = CollabServiceStub(self._channel)
        # Keys of one client sort behind each other, which keeps the database's index of them compact. The prefix is
        # not made with the client: processes that are forked from one that holds a client must not share it.
        self._key_prefix = secrets.token_hex(10)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel. What is still under way fails."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    @property
    def stub(self) -> "CollabServiceAsyncStub":
        """The generated stub on the client's channel, for those who want the protobuf messages themselves.

        Raises:
            RuntimeError: The client is not open.
        """
        if self._stub is None:
            raise RuntimeError("the client is not open; use it with: async with CollabClient(...) as client")
        return self._stub

    async def is_serving(self, *, timeout: float = 5.0) -> bool:
        """Tell whether the service is healthy; False when it answers but cannot work, as without its database.

        Asks once.

        Raises:
            Unavailable: The service does not answer.
            ServiceError: Something else answers there.
        """
        _ = self.stub
        assert self._channel is not None
        with rpc_errors(writes=False):
            response = await health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=min(timeout, _LONGEST_TIMEOUT)
            )
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def create_session(
        self,
        *,
        language_id: int | None = None,
        owner_id: str | None = None,
        room: str | None = None,
        timeout: float | None = None,
    ) -> CreatedSession:
        """Create a session, or return the one that already has the room, unchanged.

        Without a room it is not sent again after a cut, since it could create a second session. With one,
        `created` may be False although a first attempt that was cut has created it.

        Args:
            language_id: What the session is written in; at least 1.
            owner_id: The user who owns it.
            room: The name by which it can be found; no two sessions share one.
            timeout: Seconds with all attempts.

        Raises:
            InvalidRequest: A field is not valid.
        """
        request = message_of(pb.CreateSessionRequest, language_id=language_id, owner_id=owner_id, room=room)
        response = await self._call(self.stub.CreateSession, request, timeout, repeatable=room is not None)
        return CreatedSession(session_of(response.session), response.created)

    async def get_session(
        self, session_id: int | None = None, *, room: str | None = None, timeout: float | None = None
    ) -> Session:
        """Return a session, by its id or by its room.

        Raises:
            SessionNotFound: There is none.
            InvalidRequest: A field is not valid.
        """
        if (session_id is None) == (room is None):
            raise TypeError("give either a session_id or a room")
        request = message_of(pb.GetSessionRequest, session_id=session_id, room=room)
        return session_of((await self._call(self.stub.GetSession, request, timeout, writes=False)).session)

    async def list_sessions(
        self, *, language_id: int | None = None, owner_id: str | None = None, page_size: int = 1000
    ) -> AsyncGenerator[Session, None]:
        """Yield all sessions, the most recently active first; one that becomes active meanwhile may be missed.

        Args:
            language_id: Only sessions with this language.
            owner_id: Only sessions of this owner.
            page_size: How many to ask for at a time, 1 to 1,000.

        Raises:
            InvalidRequest: A field is not valid.
        """
        token = ""
        while True:
            page = await self.list_sessions_page(
                language_id=language_id, owner_id=owner_id, page_size=page_size, page_token=token
            )
            for session in page.sessions:
                yield session
            token = page.next_page_token
            if not token:
                return

    async def list_sessions_page(
        self,
        *,
        language_id: int | None = None,
        owner_id: str | None = None,
        page_size: int = 0,
        page_token: str = "",
        timeout: float | None = None,
    ) -> SessionPage:
        """Return a page of the sessions.

        Args:
            language_id: Only sessions with this language.
            owner_id: Only sessions of this owner.
            page_size: How many at most; 0 means 100, above 1,000 is cut to 1,000.
            page_token: The `next_page_token` of the page before, with the same filters; empty for the first.
            timeout: Seconds with all attempts.

        Raises:
            InvalidRequest: A field is not valid, or the token belongs to other filters.
        """
        request = message_of(
            pb.ListSessionsRequest,
            language_id=language_id,
            owner_id=owner_id,
            page_size=page_size,
            page_token=page_token,
        )
        response = await self._call(self.stub.ListSessions, request, timeout, writes=False)
        return SessionPage(tuple(map(session_of, response.sessions)), response.next_page_token)

    async def touch_session(self, session_id: int, *, timeout: float | None = None) -> Session:
        """Move a session's `last_active` to now.

        Raises:
            SessionNotFound: There is no such session.
        """
        request = message_of(pb.TouchSessionRequest, session_id=session_id)
        return session_of((await self._call(self.stub.TouchSession, request, timeout, repeatable=True)).session)

    async def delete_session(self, session_id: int, *, timeout: float | None = None) -> None:
        """Delete a session with its events.

        Raises:
            SessionNotFound: There is no such session.
        """
        request = message_of(pb.DeleteSessionRequest, session_id=session_id)
        try:
            await self._call(self.stub.DeleteSession, request, timeout, repeatable=True)
        except SessionNotFound as error:
            if error.side_effects == "none":
                raise
            # An attempt that was cut has deleted it.

    async def remove_user(self, user_id: str, *, timeout: float | None = None) -> int:
        """Take a user off the sessions they own, and return how many those were.

        It is not sent again after a cut, since the number would be wrong; repeating it yourself does no harm.
        """
        request = message_of(pb.RemoveUserRequest, user_id=user_id)
        return (await self._call(self.stub.RemoveUser, request, timeout)).sessions_released

    async def append(
        self,
        session_id: int,
        event: NewEvent,
        *,
        expected_last_server_seq: int | None = None,
        auto_key: bool = True,
        timeout: float | None = None,
    ) -> Appended:
        """Append an event. When it returns, the event is durable and every later read sees it.

        Args:
            session_id: The session.
            event: The event.
            expected_last_server_seq: Append only if this is the session's last number; 0: only if it is empty.
            auto_key: Give the event an idempotency key if it has none. Without any, the append is not sent again
                after a cut.
            timeout: Seconds with all attempts.

        Raises:
            SessionNotFound: There is no such session.
            ServerSeqConflict: The session's last number is another. Nothing was written.
            InvalidRequest: A field is not valid, the event is too large, or its key is stored with other content.
        """
        adds_key = auto_key and event.idempotency_key is None
        if adds_key:
            event = replace(event, idempotency_key=self._new_key())
        request = message_of(
            pb.AppendEventRequest,
            session_id=session_id,
            event=event_to_message(event),
            expected_last_server_seq=expected_last_server_seq,
        )
        response = await self._call(
            self.stub.AppendEvent, request, timeout, repeatable=event.idempotency_key is not None
        )
        # With a key of our own, what an attempt of this call has stored is no replay to the caller.
        return Appended(event_of(response.event), response.replayed and not adds_key)

    async def append_batch(
        self,
        session_id: int,
        events: Iterable[NewEvent],
        *,
        expected_last_server_seq: int | None = None,
        auto_key: bool = True,
        timeout: float | None = None,
    ) -> AppendedBatch:
        """Append events as neighbours, all or none. At most 1,000 of them, and 4 MiB of payloads.

        Args:
            session_id: The session.
            events: The events, at least one.
            expected_last_server_seq: Append only if this is the session's last number; 0: only if it is empty.
            auto_key: Give the first event an idempotency key if no event has one, which is enough to make the batch
                safe to send again. Without any, it is not sent again after a cut.
            timeout: Seconds with all attempts.

        Raises:
            SessionNotFound: There is no such session.
            ServerSeqConflict: The session's last number is another. Nothing was written.
            InvalidRequest: A field is not valid, the batch is too large, or a key is stored with other content.
        """
        batch = list(events)
        has_key = any(event.idempotency_key is not None for event in batch)
        adds_key = auto_key and not has_key and bool(batch)
        if adds_key:
            batch[0] = replace(batch[0], idempotency_key=self._new_key())
        request = message_of(
            pb.AppendEventsRequest,
            session_id=session_id,
            events=events_to_messages(batch),
            expected_last_server_seq=expected_last_server_seq,
        )
        response = await self._call(self.stub.AppendEvents, request, timeout, repeatable=has_key or adds_key)
        return AppendedBatch(
            response.first_server_seq,
            response.last_server_seq,
            time_of(response.create_time),
            response.replayed and not adds_key,
        )

    def appender(self) -> Appender:
        """Return an appender: for many events, many times as fast as `append`. Use it as a context manager.

        Any number of coroutines may await its `append` at once, each for its own acknowledgement.
        """
        return Appender(self.stub, retry=self._retry, timeout=self.timeout, new_key=self._new_key)

    async def read(
        self,
        session_id: int,
        *,
        since: int = 0,
        limit: int = 0,
        types: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield a session's events up to its head as it is now, in bounded memory, each once and in order.

        Leave it early within `contextlib.aclosing`, so that the call ends at once.

        Args:
            session_id: The session.
            since: Begin after this number; 0 is the beginning.
            limit: End after so many events; 0 means all.
            types: Only events of these types; none means every event.
            timeout: Seconds without progress after which it gives up.

        Raises:
            SessionNotFound: There is no such session.
            ServerSeqBeyondHead: The session has not reached `since`.
        """
        read = self.read_pages(session_id, since=since, limit=limit, types=types, timeout=timeout)
        async with aclosing(read):
            async for page in read:
                for event in page.events:
                    yield event

    def read_pages(
        self,
        session_id: int,
        *,
        since: int = 0,
        limit: int = 0,
        types: Sequence[str] = (),
        timeout: float | None = None,
        of_columns: bool = False,
    ) -> AsyncGenerator[EventPage, None]:
        """Yield what `read` does, page by page: at least one page, at most 500 events in each.

        With `of_columns`, the service makes the events of the columns of its table, and not of the messages that it
        keeps beside them for lists. Both say the same, and `collab verify` holds one against the other.
        """
        timeout = self._timeout(timeout)
        cursor = Cursor(session_id, since, limit, types, follow=False, of_columns=of_columns)
        return pages(self.stub, cursor, self._retry, timeout=timeout, patience=timeout)

    async def follow(
        self,
        session_id: int,
        *,
        since: int = 0,
        limit: int = 0,
        types: Sequence[str] = (),
        timeout: float | None = None,
        patience: float = math.inf,
    ) -> AsyncGenerator[Event, None]:
        """Yield a session's events, then those that come, for ever: each once and in order.

        It goes on by itself after cuts and restarts, through any replica. To know when it has caught up, use
        `follow_pages`. Leave it early within `contextlib.aclosing`, so that the call ends at once.

        Args:
            session_id: The session.
            since: Begin after this number; 0 is the beginning, `END` the session's end as it is now.
            limit: End after so many events; 0 means never.
            types: Only events of these types; none means every event.
            timeout: Seconds for the beginning, with all attempts.
            patience: Seconds to go on trying whenever it was cut; for ever unless given.

        Raises:
            SessionNotFound: There is no such session (any more).
            ServerSeqBeyondHead: The session has not reached `since`, or was restored to an earlier state.
        """
        follow = self.follow_pages(
            session_id, since=since, limit=limit, types=types, timeout=timeout, patience=patience
        )
        async with aclosing(follow):
            async for page in follow:
                for event in page.events:
                    yield event

    async def follow_pages(
        self,
        session_id: int,
        *,
        since: int = 0,
        limit: int = 0,
        types: Sequence[str] = (),
        timeout: float | None = None,
        patience: float = math.inf,
    ) -> AsyncGenerator[EventPage, None]:
        """Yield what `follow` does, page by page: the first at once, an empty one after every 10 s of silence.

        A page tells how far it reaches (`through_server_seq`) and whether that is the head (`is_caught_up`).
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout(timeout)
        if since == END:
            since = (await self.get_session(session_id, timeout=timeout)).last_server_seq
        cursor = Cursor(session_id, since, limit, types, follow=True)
        follow = pages(self.stub, cursor, self._retry, timeout=deadline - loop.time(), patience=patience)
        async with aclosing(follow):
            with suppress(StopAsyncIteration):
                while True:
                    yield await anext(follow)  # and hold it no longer: it may be large

    async def _call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Message,
        timeout: float | None,
        *,
        writes: bool = True,
        repeatable: bool = False,
    ) -> Response:
        """Make a call, again and again while that may help.

        Args:
            method: What to call.
            request: With what.
            timeout: Seconds with all attempts; None means the client's.
            writes: Whether it changes anything.
            repeatable: Whether it does no harm to send it again when an attempt may have taken effect.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout(timeout)
        backoff = Backoff(self._retry)
        written_perhaps = False
        while True:
            try:
                left = min(max(deadline - loop.time(), 0.0), _LONGEST_TIMEOUT)
                with rpc_errors(writes=writes):
                    return await method(request, timeout=left, metadata=call_metadata())
            except ServiceError as error:
                written_perhaps |= error.side_effects == "unknown"
                if written_perhaps:
                    error.side_effects = "unknown"
                pause = None
                if error.is_retryable and (repeatable or not written_perhaps):
                    pause = backoff.next(error.retry_after)
                if pause is None or loop.time() + pause + SHORTEST_ATTEMPT >= deadline:
                    raise
            await asyncio.sleep(pause)

    def _timeout(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    def _new_key(self) -> str:
        return f"{self._key_prefix}-{next(self._key_numbers)}"
