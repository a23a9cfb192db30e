"""Events as protobuf messages, made once.

A list of events has nothing to decide about them. So each row has an envelope: the bytes of its message, as `Event` in
the protos and https://protobuf.dev/programming-guides/encoding/ describe them, up to the payload, which comes last and
is not stored twice. A page of a list is envelopes and payloads, one after the other: PostgreSQL joins them in 0.7 µs an
event, where turning rows into Python objects and those into messages takes 5.

The envelope is made of what is written into the columns, when it is. The id may not be known until then; it stands at a
fixed place and with a fixed length, so that the statement that takes it can put it there.
"""

from collections.abc import Iterable
from functools import lru_cache

from collab_service.model import Event

_VARINT, _LENGTH_DELIMITED = 0, 2

_CACHED = 1_024
"""Results that are kept of each function whose arguments come again and again."""


def _varint(number: int) -> bytes:
    if number < 1 << 7:
        return number.to_bytes(1)
    return _MORE[number & 127] + _higher(number >> 7)


_MORE = tuple((group | 128).to_bytes(1) for group in range(128))
_higher = lru_cache(_CACHED)(_varint)
"""What is the same for a hundred numbers in a row."""


def _wide_varint(number: int, width: int) -> bytes:
    """Return a varint of so many bytes, which may be more than the number needs."""
    groups = [number >> 7 * group & 127 | 128 for group in range(width)]
    groups[-1] &= 127
    return bytes(groups)


_higher_of_id = lru_cache(_CACHED)(_wide_varint)


def _tags(kind: int, *fields: int) -> Iterable[bytes]:
    return (_varint(field << 3 | kind) for field in fields)


(_EVENTS,) = _tags(_LENGTH_DELIMITED, 1)
_ID, _SESSION_ID, _SERVER_SEQ, _CLIENT_SEQ = _tags(_VARINT, 1, 2, 3, 5)
_ACTOR_ID, _TYPE, _JSON, _BINARY = _tags(_LENGTH_DELIMITED, 4, 6, 7, 8)
_HASH, _SIGNATURE, _IDEMPOTENCY_KEY, _CREATE_TIME = _tags(_LENGTH_DELIMITED, 9, 10, 11, 12)
(_CHAIN_HASH,) = (tag + _varint(32) for tag in _tags(_LENGTH_DELIMITED, 13))
_SECONDS, _NANOS = _tags(_VARINT, 1, 2)

_ID_BYTES = 9
_LENGTH_BYTES = 4
_ID_AT = 1 + len(_EVENTS) + _LENGTH_BYTES + len(_ID)
"""Where the id begins; in SQL the first byte is the first one."""


def envelope(event: Event) -> bytes:
    """Return an event's bytes in a message with `repeated Event events = 1`, but for those of its payload."""
    content = event.content
    payload = content.payload
    if isinstance(payload, str):
        tag, size = _JSON, len(payload) if payload.isascii() else len(payload.encode())
    else:
        tag, size = _BINARY, len(payload)
    fields = b"".join((
        _NO_ID if event.id == 0 else _id(event.id),
        _session_id(event.session_id), _create_time(event.created_at), _author(content.actor_id, content.type),
        _SERVER_SEQ, _varint(event.server_seq),
        b"" if content.client_seq is None else _CLIENT_SEQ + _varint(content.client_seq),
        b"" if content.hash is None else _text(_HASH, content.hash),
        _bytes(_SIGNATURE, content.signature) if content.signature else b"",
        b"" if content.idempotency_key is None else _text(_IDEMPOTENCY_KEY, content.idempotency_key),
        _CHAIN_HASH, event.chain_hash,
        _payload(tag, size),
    ))  # fmt: skip
    return _length(len(fields) + size) + fields


def message(event: Event) -> bytes:
    """Return an event's bytes in a message with `repeated Event events = 1`."""
    payload = event.content.payload
    return envelope(event) + (payload.encode() if isinstance(payload, str) else payload)


def _bytes(tag: bytes, value: bytes) -> bytes:
    return tag + _varint(len(value)) + value


def _text(tag: bytes, value: str) -> bytes:
    return _bytes(tag, value.encode())


def _id(number: int) -> bytes:
    return _ID + _MORE[number & 127] + _higher_of_id(number >> 7, _ID_BYTES - 1)


_NO_ID = _id(0)


# What events of a batch mostly have in common, or what takes few values, is encoded once.


@lru_cache(_CACHED)
def _length(length: int) -> bytes:
    return _EVENTS + _wide_varint(length, _LENGTH_BYTES)


@lru_cache(_CACHED)
def _session_id(session_id: int) -> bytes:
    return _SESSION_ID + _varint(session_id)


@lru_cache(_CACHED)
def _create_time(created_at: int) -> bytes:
    seconds, micros = divmod(created_at, 1_000_000)
    return _bytes(_CREATE_TIME, _SECONDS + _varint(seconds) + _NANOS + _varint(micros * 1_000))


@lru_cache(_CACHED)
def _author(actor_id: str | None, type_: str | None) -> bytes:
    actor = b"" if actor_id is None else _text(_ACTOR_ID, actor_id)
    return actor if type_ is None else actor + _text(_TYPE, type_)


@lru_cache(_CACHED)
def _payload(tag: bytes, size: int) -> bytes:
    return tag + _varint(size)


def _sql_of_id(number: str) -> str:
    """Return SQL for an `int8` from 0 on as a varint of `_ID_BYTES`: groups of seven bits, the lowest first."""
    eight = " | ".join(
        f"(({number} & {127 << 7 * group}) {'<<' if (shift := 56 - 15 * group) >= 0 else '>>'} {abs(shift)})"
        for group in range(8)
    )
    high_bits = int.from_bytes(b"\x80" * 8, signed=True)
    return f"int8send({eight} | ({high_bits})) || substr(int8send({number} >> 56), 8, 1)"


def sql_with_id(envelope: str, number: str) -> str:
    """Return SQL for an envelope that was made without an id, with this one."""
    return f"overlay({envelope} PLACING {_sql_of_id(number)} FROM {_ID_AT})"
