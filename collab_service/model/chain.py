"""The SHA-256 chain over a session's events, with which anyone who holds a log can check it.

The formats are those of the public contract (`Event.chain_hash` in the protos): every field is told apart from its
neighbours by its length, and an event's content enters by its digest alone, so that it can be erased one day without
breaking the chain.
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import Protocol

from collab_service.model.event import Event

_u32 = Struct(">I").pack
_leaf_numbers = Struct(">QQQ").pack
_u64 = Struct(">Q").pack
_ABSENT = b"\0"


class Content(Protocol):
    """What an author gave, in whatever form it is held."""

    @property
    def actor_id(self) -> str | None: ...
    @property
    def client_seq(self) -> int | None: ...
    @property
    def type(self) -> str | None: ...
    @property
    def payload(self) -> str | bytes: ...
    @property
    def hash(self) -> str | None: ...
    @property
    def signature(self) -> bytes: ...
    @property
    def idempotency_key(self) -> str | None: ...


def _opt(value: bytes) -> bytes:
    return b"\1" + _u32(len(value)) + value


def _opt_text(value: str | None) -> bytes:
    return _ABSENT if value is None else _opt(value.encode())


_repeated_text = lru_cache(1_024)(_opt_text)
"""For what many events have in common."""


def content_digest(event: Content) -> bytes:
    """Return the 32-byte digest of everything that the author gave."""
    payload = event.payload
    kind, data = (b"\1", payload.encode()) if isinstance(payload, str) else (b"\2", payload)
    return sha256(
        b"".join(
            (
                b"collab-content-v1",
                _repeated_text(event.actor_id),
                _ABSENT if event.client_seq is None else _opt(b"%d" % event.client_seq),
                _repeated_text(event.type),
                kind,
                _u32(len(data)),
                data,
                _opt_text(event.hash),
                _opt(event.signature) if event.signature else _ABSENT,
                _opt_text(event.idempotency_key),
            )
        )
    ).digest()


def chain_start(session_id: int) -> bytes:
    """Return chain(0), the head of a session without events."""
    return sha256(b"collab-session-v1" + _u64(session_id)).digest()


def chain_next(previous: bytes, session_id: int, server_seq: int, created_at: int, content: bytes) -> bytes:
    """Return chain(n) from chain(n-1) and the event's numbers, time (µs) and content digest."""
    leaf = sha256(b"collab-event-v1" + _leaf_numbers(session_id, server_seq, created_at) + content).digest()
    return sha256(previous + leaf).digest()


def first_broken_link(previous: bytes, events: Iterable[Event]) -> Event | None:
    """Return the first of `events` whose chain hash does not follow from `previous` and those before it."""
    for event in events:
        previous = chain_next(
            previous, event.session_id, event.server_seq, event.created_at, content_digest(event.content)
        )
        if previous != event.chain_hash:
            return event
    return None
