"""From the client's values to protobuf messages, and back."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from collab_service.client.errors import Violation, invalid
from collab_service.client.values import Event, EventPage, NewEvent, Session
from collab_service.v1 import collab_service_pb2 as pb

M = TypeVar("M", bound=Message)


def message_of(kind: Callable[..., M], path: str = "", **fields: Any) -> M:
    """Return a message with the given fields; None leaves one out.

    Raises:
        InvalidRequest: A value cannot be sent as its field: it has the wrong type, is out of the field's range, or is
            no valid Unicode. Names each such field.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        violations = []
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                violations.append(Violation(path + name, f"cannot be {_shown(value)}: {error}"))
        if not violations:
            raise
        raise invalid(violations) from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def event_to_message(event: NewEvent, path: str = "event.") -> pb.NewEvent:
    """Return an event as it is sent; raises `InvalidRequest` as `message_of` does."""
    payload: object = event.payload  # whatever its annotation says
    if not isinstance(payload, str | bytes):
        what = f"must be the text of a JSON object (str) or bytes, not {type(payload).__name__}; see NewEvent.of"
        raise invalid([Violation(path + "payload", what)])
    return message_of(
        pb.NewEvent,
        path,
        actor_id=event.actor_id,
        client_seq=event.client_seq,
        type=event.type,
        hash=event.hash,
        signature=event.signature,
        idempotency_key=event.idempotency_key,
        **{"json" if isinstance(payload, str) else "binary": payload},
    )


def events_to_messages(events: Sequence[NewEvent]) -> list[pb.NewEvent]:
    """Return the events of a batch as they are sent; raises `InvalidRequest` as `message_of` does."""
    return [event_to_message(event, f"events[{index}].") for index, event in enumerate(events)]


def event_of(message: pb.Event) -> Event:
    """Return a stored event."""
    present = message.HasField
    return Event(
        message.id,
        message.session_id,
        message.server_seq,
        time_of(message.create_time),
        message.chain_hash,
        message.json if present("json") else message.binary,
        message.actor_id if present("actor_id") else None,
        message.client_seq if present("client_seq") else None,
        message.type if present("type") else None,
        message.hash if present("hash") else None,
        message.signature,
        message.idempotency_key if present("idempotency_key") else None,
    )


def page_of(message: pb.ListEventsResponse) -> EventPage:
    """Return a page of events."""
    return EventPage(tuple(map(event_of, message.events)), message.through_server_seq, message.head_server_seq)


def session_of(message: pb.Session) -> Session:
    """Return a session."""
    present = message.HasField
    return Session(
        message.id,
        message.language_id if present("language_id") else None,
        message.owner_id if present("owner_id") else None,
        message.room if present("room") else None,
        time_of(message.create_time),
        time_of(message.last_active_time),
        message.first_server_seq,
        message.last_server_seq,
        message.chain_hash,
    )


def time_of(message: Timestamp) -> datetime:
    """Return a time, exact to the microsecond."""
    return datetime.fromtimestamp(message.seconds, UTC).replace(microsecond=message.nanos // 1_000)
