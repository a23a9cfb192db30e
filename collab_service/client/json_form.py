"""Sessions and events as JSON, in the shapes of the public contract's HTTP half."""

import base64
from collections.abc import Callable
from datetime import datetime

from msgspec import UNSET, Raw, Struct, UnsetType

from collab_service.client.values import Event, Session

_NULL = Raw(b"null")
_LINE_BREAKS = str.maketrans("\r\n", "  ")


class SessionForm(Struct, frozen=True, rename="camel"):
    """A session."""

    id: int
    language_id: int | None
    owner_id: str | None
    room: str | None
    created_at: str
    last_active: str
    last_server_seq: int


class EventForm(Struct, frozen=True, rename="camel"):
    """An event."""

    id: int
    session_id: int
    actor_id: str | None
    client_seq: int | None
    server_seq: int
    type: str | None
    payload: Raw
    """The text of the payload as it is; `null` when it is binary."""
    hash: str | None
    signature: str | None
    """In base64."""
    idempotency_key: str | None
    created_at: str
    chain_hash: str
    """In hexadecimal."""
    payload_base64: str | UnsetType = UNSET


def session_form(session: Session) -> SessionForm:
    """Return a session in its JSON form."""
    return SessionForm(
        session.id,
        session.language_id,
        session.owner_id,
        session.room,
        iso_time(session.created_at),
        iso_time(session.last_active),
        session.last_server_seq,
    )


def line_form(event: Event) -> EventForm:
    """Return an event in the JSON form that is one line: line breaks between the payload's tokens become spaces."""
    return event_form(event, one_line)


def event_form(event: Event, text_of: Callable[[str], str] = str) -> EventForm:
    """Return an event in its JSON form, with the payload's text as `text_of` makes it: as it is, unless given."""
    payload = event.payload
    return EventForm(
        event.id,
        event.session_id,
        event.actor_id,
        event.client_seq,
        event.server_seq,
        event.type,
        Raw(text_of(payload).encode()) if isinstance(payload, str) else _NULL,
        event.hash,
        base64.b64encode(event.signature).decode() if event.signature else None,
        event.idempotency_key,
        iso_time(event.created_at),
        event.chain_hash.hex(),
        base64.b64encode(payload).decode() if isinstance(payload, bytes) else UNSET,
    )


def one_line(payload: str) -> str:
    """Return the text of a JSON object with spaces for line breaks, which can only stand between its tokens."""
    return payload.translate(_LINE_BREAKS)


def iso_time(time: datetime) -> str:
    """Return a time in UTC as ISO 8601 with six decimals and `Z`."""
    return time.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
