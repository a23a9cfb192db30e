"""Event rows: which columns there are, how each is packed for an insert, and how a row becomes an `Event`."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from collab_service.model import Event, NewEvent
from collab_service.storage import binary


class ContentColumn(NamedTuple):
    """A column that the author gives."""

    name: str
    array_type: int
    pack: Callable[[Sequence[Any]], bytes]
    value: Callable[[NewEvent], Any]


def _text(name: str, value: Callable[[NewEvent], str | None] | None = None) -> ContentColumn:
    return ContentColumn(name, binary.TEXT_ARRAY, binary.text_array, value or attrgetter(name))


def _bytea(name: str, value: Callable[[NewEvent], bytes | None]) -> ContentColumn:
    return ContentColumn(name, binary.BYTEA_ARRAY, binary.bytea_array, value)


CONTENT_COLUMNS = (
    _text("actor_id"),
    ContentColumn("client_seq", binary.INT8_ARRAY, binary.int8_array, attrgetter("client_seq")),
    _text("type"),
    _text("payload_json", lambda event: event.payload if isinstance(event.payload, str) else None),
    _bytea("payload_binary", lambda event: event.payload if isinstance(event.payload, bytes) else None),
    _text("hash"),
    _bytea("signature", lambda event: event.signature or None),
    _text("idempotency_key"),
)

EVENT_COLUMNS = ("id", "session_id", "server_seq", "created_at", "chain_hash", *(c.name for c in CONTENT_COLUMNS))
"""What `event_from_row` expects, in its order."""


def event_from_row(row: Sequence[Any]) -> Event:
    """Return the event of a row of `EVENT_COLUMNS`, its time in microseconds."""
    (
        event_id, session_id, server_seq, created_at, chain_hash,
        actor_id, client_seq, event_type, json, opaque, hash_, signature, idempotency_key,
    ) = row  # fmt: skip
    payload = opaque if json is None else json
    content = NewEvent(actor_id, client_seq, event_type, payload, hash_, signature or b"", idempotency_key)
    return Event(event_id, session_id, server_seq, created_at, chain_hash, content)
