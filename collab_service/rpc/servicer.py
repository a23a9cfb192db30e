"""The RPCs. Each does four things: validate, convert, call, convert back."""

from contextlib import aclosing

from collab_service.log.decide import AppendRequest
from collab_service.log.service import LogService
from collab_service.metrics import RpcMetrics
from collab_service.model import Limits
from collab_service.model.errors import IdempotencyKeyReused, ShuttingDown
from collab_service.rpc.append_stream import AppendStream, HeldByStreams
from collab_service.rpc.convert import PageEncoder, appended_message, event_message, session_message
from collab_service.rpc.page_token import make_page_token
from collab_service.rpc.reads import Context, Requests
from collab_service.rpc.validate import Check, session_of
from collab_service.rpc.writes import Writes, begin
from collab_service.v1 import collab_service_pb2 as pb

_OF_COLUMNS = ("collab-events-of", "columns")
"""Metadata that asks for events as the columns have them, for `collab verify`."""


class Servicer:
    """`CollabService`, as the protos describe it."""

    def __init__(self, service: LogService, limits: Limits, metrics: RpcMetrics) -> None:
        self._service = service
        self._limits = limits
        self._append_streams: set[AppendStream] = set()
        self._held_by_streams = HeldByStreams()
        self._pages = PageEncoder()
        self.writes = Writes(metrics, lambda: service.readers_hold_too_much)
        self._stopping = False

    def look_at(self, append: bytes) -> None:
        """Raise `Overloaded` for an append to a session for which too much is waiting, before it is decoded."""
        if (session_id := session_of(append)) is not None:
            self._service.check_room(session_id, len(append))

    def stop_streams(self) -> None:
        """End all follows, also those whose reader takes no message; and appends, once what was read is answered."""
        self._stopping = True
        for stream in self._append_streams:
            stream.stop(ShuttingDown())
        self._service.stop_following()
        self.writes.stop()

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """Create a session, or return the one that has the room."""
        with Check(self._limits) as check:
            language_id = self._language_id(check, request)
            owner_id = self._owner_id(check, request)
            room = check.text("room", request.room) if request.HasField("room") else None
        session, created = await self._service.create_session(language_id=language_id, owner_id=owner_id, room=room)
        return pb.CreateSessionResponse(session=session_message(session), created=created)

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """Return a session."""
        key = request.WhichOneof("key")
        with Check(self._limits) as check:
            if key is None:
                check.wrong("session_id", "must be given, or room")
            elif key == "room":
                check.text("room", request.room)
            else:
                check.at_least(1, "session_id", request.session_id)
        if key == "room":
            session = await self._service.get_session_by_room(request.room)
        else:
            session = await self._service.get_session(request.session_id)
        return pb.GetSessionResponse(session=session_message(session))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """Return a page of sessions."""
        with Check(self._limits) as check:
            language_id = self._language_id(check, request)
            owner_id = self._owner_id(check, request)
            filters = (language_id, owner_id)
            after = check.page_token(request.page_token, filters)
            count = check.page_size(request.page_size)
        sessions, place = await self._service.list_sessions(
            language_id=language_id, owner_id=owner_id, after=after, count=count
        )
        return pb.ListSessionsResponse(
            sessions=map(session_message, sessions), next_page_token=make_page_token(place, filters) if place else ""
        )

    async def TouchSession(self, request: pb.TouchSessionRequest, context: Context) -> pb.TouchSessionResponse:
        """Move a session's activity to now."""
        with Check(self._limits) as check:
            check.at_least(1, "session_id", request.session_id)
        return pb.TouchSessionResponse(session=session_message(await self._service.touch_session(request.session_id)))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        """Delete a session."""
        with Check(self._limits) as check:
            check.at_least(1, "session_id", request.session_id)
        await self._service.delete_session(request.session_id)
        return pb.DeleteSessionResponse()

    async def RemoveUser(self, request: pb.RemoveUserRequest, context: Context) -> pb.RemoveUserResponse:
        """Release the sessions of a user."""
        with Check(self._limits) as check:
            check.text("user_id", request.user_id)
        return pb.RemoveUserResponse(sessions_released=await self._service.remove_user(request.user_id))

    async def AppendEvent(self, request: pb.AppendEventRequest, context: Context) -> pb.AppendEventResponse:
        """Append one event."""
        with Check(self._limits) as check:
            if not request.HasField("event"):
                check.wrong("event", "must be given; each of its fields may be absent")
            event, _ = check.event("event", request.event)
            append = check.append(request, [event])
        del request  # what waits is held once
        try:
            appended = await self._service.append(append)
        except IdempotencyKeyReused as error:
            raise error.of_single_event() from error
        return pb.AppendEventResponse(event=event_message(appended.events[0]), replayed=appended.replayed)

    async def AppendEvents(self, request: pb.AppendEventsRequest, context: Context) -> pb.AppendEventsResponse:
        """Append a batch."""
        batch = self._batch(request)
        del request  # what waits is held once
        return appended_message(await self._service.append(batch))

    async def AppendStream(self, requests: Requests[pb.AppendStreamRequest], context: Context) -> None:
        """Append batches, many on their way at once."""
        if self._stopping:
            raise ShuttingDown
        self._held_by_streams.check_room(len(self._append_streams) + 1)
        stream = AppendStream(self._service, self._batch, context, self._held_by_streams)
        self._append_streams.add(stream)
        try:
            await stream.run(requests)
        finally:
            self._append_streams.discard(stream)

    def _batch(self, request: pb.AppendEventsRequest) -> AppendRequest:
        with Check(self._limits) as check:
            return check.append(request, check.batch(request.events))

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> None:
        """Send a session's events."""
        with Check(self._limits) as check:
            check.at_least(1, "session_id", request.session_id)
            check.at_least(0, "since_server_seq", request.since_server_seq)
            check.at_least(0, "limit", request.limit)
            types = check.types(request.types)
        follow = request.follow
        read = self._service.follow if follow else self._service.read
        pages = read(
            request.session_id,
            since=request.since_server_seq,
            limit=request.limit,
            types=types,
            encoded=_OF_COLUMNS not in (context.invocation_metadata() or ()),
        )
        del request  # which may be large, and a follow goes on for long
        begun = False
        async with aclosing(pages):
            async for page in pages:
                message = self._pages.encode(page)
                del page  # a reader that stalls shall cost no more than the bytes
                if not begun:
                    await begin(context)
                    begun = True
                await self.writes.write(message, context, follow=follow)

    def _language_id(self, check: Check, request: pb.CreateSessionRequest | pb.ListSessionsRequest) -> int | None:
        return check.at_least(1, "language_id", request.language_id) if request.HasField("language_id") else None

    def _owner_id(self, check: Check, request: pb.CreateSessionRequest | pb.ListSessionsRequest) -> str | None:
        return check.text("owner_id", request.owner_id) if request.HasField("owner_id") else None
