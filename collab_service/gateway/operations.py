"""The calls of the HTTP half of the public contract, as data: the routes and the OpenAPI document come from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct
from starlette.convertors import Convertor, register_url_convertor

from collab_service.client.json_form import EventForm, SessionForm
from collab_service.gateway import forms
from collab_service.gateway.handlers import EVENT_STREAM, JSON_LINES


@dataclass(frozen=True, slots=True)
class Operation:
    """One call."""

    method: str
    path: str
    handler: str
    """The name of the method of `Handlers`, which describes it."""
    answers: Mapping[int, tuple[str, Any]]
    """By status: a description, and the type of the body."""
    errors: tuple[int, ...] = ()
    """The statuses of errors, besides those that every call can have."""
    query: type[Struct] = forms.NoQuery
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Request headers, with a description of each."""
    other_forms: Mapping[str, str] = field(default_factory=dict)
    """Other media types of the answer, with a description of each."""


class _Text(Convertor[str]):
    """All that is left of a path: also slashes, and line breaks, at which Starlette's `path` would stop."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _Text())

_SESSIONS = "/api/collab/sessions"
_KEY = {"Idempotency-Key": "Makes the append safe to send again: the same key and content is not stored twice."}
_APPEND_ERRORS = (404, 409, 413, 415)

OPERATIONS = (
    Operation(
        "POST",
        "/api/collab/events",
        "append_event",
        {201: ("The event as it is stored.", EventForm), 200: ("It had been stored before.", EventForm)},
        _APPEND_ERRORS,
        body=forms.SessionEventBody,
        headers=_KEY,
    ),
    Operation(
        "GET",
        "/api/collab/events",
        "list_events",
        {200: ("The events, in order.", list[EventForm])},
        (404,),
        query=forms.EventsQuery,
        headers={"Last-Event-ID": "Of server-sent events: goes on after this number."},
        other_forms={
            JSON_LINES: "One event a line.",
            EVENT_STREAM: "Follows the session: the id is the serverSeq, the data the event.",
        },
    ),
    Operation(
        "POST",
        _SESSIONS + "/{id}/events",
        "append_batch",
        {201: ("Where they are stored.", forms.BatchAnswer), 200: ("They had been stored before.", forms.BatchAnswer)},
        _APPEND_ERRORS,
        query=forms.BatchQuery,
        body=list[forms.EventBody],
        headers=_KEY,
    ),
    Operation(
        "POST",
        _SESSIONS,
        "create_session",
        {201: ("The new session.", SessionForm), 200: ("The session that has the room.", SessionForm)},
        (413, 415),
        body=forms.SessionBody,
    ),
    Operation(
        "GET",
        _SESSIONS,
        "list_sessions",
        {200: ("The sessions. With pageSize, the header Link names the next page.", list[SessionForm])},
        query=forms.SessionsQuery,
    ),
    Operation("GET", _SESSIONS + "/{id}", "get_session", {200: ("The session.", SessionForm)}, (404,)),
    Operation("DELETE", _SESSIONS + "/{id}", "delete_session", {204: ("It is deleted.", None)}, (404,)),
    Operation("POST", _SESSIONS + "/{id}/activity", "touch_session", {200: ("The session.", SessionForm)}, (404,)),
    Operation(
        "DELETE",
        "/api/collab/users/{user_id:text}",
        "remove_user",
        {200: ("How many sessions they owned.", forms.ReleasedAnswer)},
    ),
)
