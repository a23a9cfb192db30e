"""Sessions and events, as every layer sees them.

Times are integers: microseconds of the Unix epoch. Ids and sequence numbers start at 1. The values are frozen; they are
msgspec structs rather than dataclasses because events are made by the hundred thousand, at a seventh of the cost; and
unknown to the garbage collector (`gc`), since nothing that they hold can ever refer back to them.
"""

from typing import NamedTuple

from msgspec import Struct

EMPTY_PAYLOAD = "{}"


class NewEvent(Struct, frozen=True, gc=False):
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


class Event(Struct, frozen=True, gc=False):
    """An event as it is stored."""

    id: int
    session_id: int
    server_seq: int
    created_at: int
    chain_hash: bytes
    content: NewEvent


class Session(Struct, frozen=True, kw_only=True):
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


class ListPosition(NamedTuple):
    """A place in the list of sessions: after the one with this stored time of activity and this id."""

    last_active: int
    session_id: int
