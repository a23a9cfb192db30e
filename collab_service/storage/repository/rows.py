"""Event rows: which columns there are, how each is packed for an insert, and how a row becomes an `Event`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from collab_service.model import Event, NewEvent
from collab_service.storage.arrays import PackedArray, bytea_array, int8_array, text_array
from collab_service.storage.times import to_micros

# The columns that an author gives, each with how it is packed and where its value comes from.
_Column = tuple[str, Callable[[Iterable[Any]], PackedArray], Callable[[NewEvent], Any]]
CONTENT_COLUMNS: tuple[_Column, ...] = (
    ("actor_id", text_array, lambda event: event.actor_id),
    ("client_seq", int8_array, lambda event: event.client_seq),
    ("type", text_array, lambda event: event.type),
    ("payload_json", text_array, lambda event: event.payload if type(event.payload) is str else None),
    ("payload_binary", bytea_array, lambda event: None if type(event.payload) is str else event.payload),
    ("hash", text_array, lambda event: event.hash),
    ("signature", bytea_array, lambda event: event.signature or None),
    ("idempotency_key", text_array, lambda event: event.idempotency_key),
)

EVENT_COLUMNS = "id, session_id, server_seq, created_at, chain_hash, " + ", ".join(name for name, *_ in CONTENT_COLUMNS)
"""What `event_from_row` expects, in its order."""


def event_from_row(row: Sequence[Any]) -> Event:
    """Return the event of a row with `EVENT_COLUMNS`."""
    (
        event_id, session_id, server_seq, created_at, chain_hash,
        actor_id, client_seq, event_type, json, binary, hash_, signature, idempotency_key,
    ) = row  # fmt: skip
    return Event(
        event_id,
        session_id,
        server_seq,
        to_micros(created_at),
        chain_hash,
        NewEvent(
            actor_id,
            client_seq,
            event_type,
            binary if json is None else json,
            hash_,
            signature or b"",
            idempotency_key,
        ),
    )
