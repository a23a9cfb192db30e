"""What the client takes and returns: plain values, frozen.

Times are aware datetimes in UTC, exact to the microsecond. Ids and numbers are integers from 1 to 2^63 - 1.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to append. Every field comes back as it was given."""

    payload: str | bytes = "{}"
    """The text of one JSON object (`str`), kept byte for byte, or anything (`bytes`). At most 1 MiB."""
    _: KW_ONLY
    actor_id: str | None = None
    """Who did it."""
    client_seq: int | None = None
    """The author's own counter, at least 0."""
    type: str | None = None
    """What kind of event it is; readers can ask for some types only."""
    hash: str | None = None
    """The author's own; not looked at."""
    signature: bytes = b""
    """The author's own, at most 1 KiB; empty means none."""
    idempotency_key: str | None = None
    """Makes an append safe to send again; unique within the session. The client adds one where there is none."""

    @classmethod
    def of(cls, value: Mapping[str, Any], **fields: Any) -> "NewEvent":
        """Return an event whose payload is the JSON text of `value`; `fields` are the other fields.

        Raises:
            ValueError: The value has no JSON text: it holds NaN or an infinity, or refers to itself.
            TypeError: It holds something that JSON does not know.
        """
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return cls(text, **fields)


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it is stored."""

    id: int
    """Its number among the events of all sessions. Only identifies: order is by `server_seq`."""
    session_id: int
    server_seq: int
    """Its number within the session: 1, 2, 3 … without gaps."""
    created_at: datetime
    """When it was appended; never before the event before it."""
    chain_hash: bytes
    """Ties it to all events before it, 32 bytes; see `LogCheck`."""
    payload: str | bytes
    actor_id: str | None
    client_seq: int | None
    type: str | None
    hash: str | None
    signature: bytes
    idempotency_key: str | None

    def value(self) -> dict[str, Any]:
        """Return the JSON payload as an object; with the payload as text, numbers of any size stay exact.

        Raises:
            ValueError: The payload is binary.
        """
        if isinstance(self.payload, bytes):
            raise ValueError(f"event {self.server_seq} of session {self.session_id} is binary and has no JSON value")
        value: dict[str, Any] = json.loads(self.payload)
        return value

    def content(self) -> NewEvent:
        """Return what its author gave."""
        return NewEvent(
            self.payload,
            actor_id=self.actor_id,
            client_seq=self.client_seq,
            type=self.type,
            hash=self.hash,
            signature=self.signature,
            idempotency_key=self.idempotency_key,
        )


@dataclass(frozen=True, slots=True)
class Session:
    """A session with its head."""

    id: int
    language_id: int | None
    owner_id: str | None
    room: str | None
    created_at: datetime
    last_active: datetime
    first_server_seq: int
    """The first number that can be read."""
    last_server_seq: int
    """The number of the last event; 0 when there is none."""
    chain_hash: bytes
    """The chain's head, 32 bytes."""


class CreatedSession(NamedTuple):
    """What creating a session returns."""

    session: Session
    created: bool
    """False when the room already had a session."""


class SessionPage(NamedTuple):
    """Some of the sessions."""

    sessions: Sequence[Session]
    next_page_token: str
    """Asks for the next page; empty at the end."""


class Appended(NamedTuple):
    """What appending an event returns."""

    event: Event
    replayed: bool
    """True when an earlier call had stored it, by its idempotency key. With a key of the caller's own that may have
    been an attempt of this call that was cut off."""


class Acknowledged(NamedTuple):
    """What appending an event through an appender returns."""

    server_seq: int
    created_at: datetime
    replayed: bool
    """True when an earlier call had stored it, by its idempotency key."""


class AppendedBatch(NamedTuple):
    """What appending a batch returns."""

    first_server_seq: int
    last_server_seq: int
    created_at: datetime
    replayed: bool
    """True when an earlier call had stored it, by one of its idempotency keys."""


@dataclass(frozen=True, slots=True)
class EventPage:
    """The next events, and how far they reach."""

    events: Sequence[Event]
    through_server_seq: int
    """Every event up to this number that was asked for has been delivered; reading on after it misses nothing."""
    head_server_seq: int
    """The session's last number as far as the server had seen; always the end of an append."""

    @property
    def is_caught_up(self) -> bool:
        """Whether there was nothing more to read."""
        return self.through_server_seq == self.head_server_seq
