"""The calls. Each does four things: read the request, call the service, convert, answer."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from http import HTTPStatus
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from collab_service.client import CollabClient, Event, Session
from collab_service.client.json_form import EventForm, SessionForm, event_form, iso_time, line_form, session_form
from collab_service.gateway.errors import invalid
from collab_service.gateway.forms import (
    WHAT_IS_RIGHT,
    BatchAnswer,
    BatchQuery,
    Detail,
    EventBody,
    EventsQuery,
    NoQuery,
    ReleasedAnswer,
    SessionBody,
    SessionEventBody,
    SessionsQuery,
)
from collab_service.gateway.requests import (
    Bodies,
    events_of,
    id_of,
    idempotency_key_of,
    list_of,
    object_of,
    query_of,
    user_id_of,
)
from collab_service.gateway.streams import FOLLOWS, Followers, array, begun, lines

JSON, JSON_LINES, EVENT_STREAM = "application/json", "application/x-ndjson", "text/event-stream"
_QUALITY = re.compile(r"[01](?:\.[0-9]{0,3})?")


class Handlers:
    """What the gateway answers to the calls of the public contract."""

    def __init__(
        self, client: CollabClient, followers: Followers, turns: asyncio.Semaphore, max_body_bytes: int
    ) -> None:
        self._client = client
        self._turns = turns
        self._followers = followers
        self._bodies = Bodies(max_body_bytes)

    async def create_session(self, request: Request) -> Response:
        """Create a session, or return the one that has the room."""
        query_of(request, NoQuery)
        async with self._bodies.of(request) as text:
            body = object_of(text, SessionBody)
        session, created = await self._client.create_session(
            language_id=body.language_id, owner_id=body.owner_id, room=body.room
        )
        return _session(session, HTTPStatus.CREATED if created else HTTPStatus.OK)

    async def list_sessions(self, request: Request) -> Response:
        """List sessions, the most recently active first: all of them, or one page."""
        query = query_of(request, SessionsQuery)
        if query.page_size is None and query.page_token is None:
            return await begun(array(self._all_sessions(query)), JSON)
        page = await self._client.list_sessions_page(
            language_id=query.language_id,
            owner_id=query.owner_id,
            page_size=query.page_size or 0,
            page_token=query.page_token or "",
        )
        answer = _json(list(map(session_form, page.sessions)))
        if page.next_page_token:
            parameters = dict(request.query_params, pageToken=page.next_page_token)
            answer.headers["link"] = f'<{request.url.path}?{urlencode(parameters)}>; rel="next"'
        return answer

    async def _all_sessions(self, query: SessionsQuery) -> AsyncGenerator[Iterable[SessionForm], None]:
        token = ""
        while True:
            page = await self._client.list_sessions_page(
                language_id=query.language_id, owner_id=query.owner_id, page_size=1_000, page_token=token
            )
            yield map(session_form, page.sessions)
            token = page.next_page_token
            if not token:
                return

    async def get_session(self, request: Request) -> Response:
        """Return a session."""
        query_of(request, NoQuery)
        return _session(await self._client.get_session(id_of(request)))

    async def delete_session(self, request: Request) -> Response:
        """Delete a session with its events."""
        query_of(request, NoQuery)
        await self._client.delete_session(id_of(request))
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def touch_session(self, request: Request) -> Response:
        """Move a session's activity to now."""
        query_of(request, NoQuery)
        return _session(await self._client.touch_session(id_of(request)))

    async def remove_user(self, request: Request) -> Response:
        """Take a user off the sessions they own."""
        query_of(request, NoQuery)
        released = await self._client.remove_user(user_id_of(request))
        return _json(ReleasedAnswer(released))

    async def append_event(self, request: Request) -> Response:
        """Append an event."""
        query_of(request, NoQuery)
        async with self._bodies.of(request) as text:
            body = object_of(text, SessionEventBody)
            (event,) = events_of([body], idempotency_key_of(request), in_batch=False)
            stored, replayed = await self._client.append(
                body.session_id, event, expected_last_server_seq=body.expected_last_server_seq, auto_key=False
            )
        return _json(event_form(stored), HTTPStatus.OK if replayed else HTTPStatus.CREATED)

    async def append_batch(self, request: Request) -> Response:
        """Append events as neighbours, all or none."""
        session_id = id_of(request)
        query = query_of(request, BatchQuery)
        async with self._bodies.of(request) as text:
            body = list_of(text, EventBody)
            events = events_of(body, idempotency_key_of(request), in_batch=True)
            stored = await self._client.append_batch(
                session_id, events, expected_last_server_seq=query.expected_last_server_seq, auto_key=False
            )
        answer = BatchAnswer(stored.first_server_seq, stored.last_server_seq, iso_time(stored.created_at))
        return _json(answer, HTTPStatus.OK if stored.replayed else HTTPStatus.CREATED)

    async def list_events(self, request: Request) -> Response:
        """List a session's events, or follow it."""
        query = query_of(request, EventsQuery)
        types = [] if query.types is None else query.types.split(",")
        wanted = _wanted(request.headers.getlist("accept"))
        if wanted == EVENT_STREAM:
            last = _last_event_id(request)
            since = query.since_server_seq if last is None else last
            answer: Response = await self._followers.answer(self._client, query, since, types)
            request.scope["state"][FOLLOWS] = True
        elif wanted == JSON_LINES:
            answer = await begun(lines(self._events(query, types, line_form)), JSON_LINES)
        else:
            answer = await begun(array(self._events(query, types, event_form)), JSON)
        answer.headers["vary"] = "Accept"
        return answer

    async def _events(
        self, query: EventsQuery, types: list[str], form: Callable[[Event], EventForm]
    ) -> AsyncGenerator[Iterable[EventForm], None]:
        pages = self._client.read_pages(query.session_id, since=query.since_server_seq, limit=query.limit, types=types)
        async with aclosing(pages):
            while True:
                async with self._turns:  # until the page has been taken, and the next one is asked for
                    page = await anext(pages, None)
                    if page is None:
                        break
                    held = [map(form, page.events)]
                    del page
                    yield held.pop()


def _wanted(accept: Sequence[str]) -> str:
    """Return the kind of list that the headers `Accept` prefer (RFC 9110, 12.5.1); without one, an array."""
    qualities = dict.fromkeys((EVENT_STREAM, JSON_LINES, JSON), 0.0)
    for given in ",".join(accept).split(","):
        kind, *parameters = (part.strip().lower() for part in given.split(";"))
        if kind in qualities:
            quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
            qualities[kind] = float(quality) if _QUALITY.fullmatch(quality) else 1.0
    wanted = max(qualities, key=qualities.__getitem__)  # the first one of several
    return wanted if qualities[wanted] else JSON


def _last_event_id(request: Request) -> int | None:
    """Return where a browser that comes again has been; raises `RequestError` when it is no number."""
    text = request.headers.get("last-event-id")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise invalid([Detail("Last-Event-ID", f"must be {WHAT_IS_RIGHT['sinceServerSeq']}")])
    return int(text)


def _session(session: Session, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return _json(session_form(session), status)


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)
