"""Sessions and events, as every layer sees them.

Times are integers: microseconds of the Unix epoch. Ids and sequence numbers start at 1.
"""

from dataclasses import dataclass

EMPTY_PAYLOAD = "{}"


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event as its author gave it. Two are equal when every field is, byte for byte."""

    actor_id: str | None = None
    client_seq: int | None = None
    type: str | None = None
    payload: str | bytes = EMPTY_PAYLOAD
    """The text of one JSON object (`str`), or anything (`bytes`)."""
    hash: str | None = None
    signature: bytes = b""
    """Empty means none."""
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it is stored."""

    id: int
    session_id: int
    server_seq: int
    created_at: int
    chain_hash: bytes
    content: NewEvent


@dataclass(frozen=True, slots=True)
class Session:
    """A session with its head."""

    id: int
    language_id: int | None
    owner_id: str | None
    room: str | None
    created_at: int
    last_active: int
    first_server_seq: int
    last_server_seq: int
    """0 when there is no event yet."""
    chain_hash: bytes
