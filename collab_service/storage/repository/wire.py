"""Events as protobuf messages, made by PostgreSQL.

A list of events has nothing to decide about them, and turning a row into Python objects and those into a message takes
5 µs, where this takes 3 in another process. So the statement that reads a page can return the bytes of its messages, as
`Event` in the protos and https://protobuf.dev/programming-guides/encoding/ describe them.

SQL is not good at numbers of varying length. But a varint may have more bytes than it needs, and one of a constant
length is an integer whose bytes are groups of seven bits, the lowest first, all but the last with the high bit set.
"""

from collab_service.storage.repository.rows import EVENT_COLUMNS

_VARINT, _LENGTH_DELIMITED = 0, 2
_SHORT, _LONG = 4, 8
"""Bytes of a varint that is made as an `int4` or as an `int8`; each holds seven bits."""


def _varint(number: str, width: int, *, groups: int | None = None, goes_on: bool = False) -> str:
    """Return SQL for a number as a varint of `width` bytes.

    Args:
        number: SQL for it: an `int4` or `int8`, for a width of four or eight, of 7 bits for each byte at most.
        width: How many bytes.
        groups: How many groups of seven bits it can have, if not as many as there are bytes.
        goes_on: More bytes follow.
    """
    parts = []
    for group in range(groups or width):
        shift = 8 * (width - 1 - group) - 7 * group
        bits = f"({number} & {127 << 7 * group})"
        parts.append(f"({bits} << {shift})" if shift >= 0 else f"({bits} >> {-shift})")
    high_bits = int.from_bytes(b"\x80" * (width - 1) + (b"\x80" if goes_on else b"\0"), signed=True)
    return f"int{width}send({' | '.join(parts)} | ({high_bits}))"


def _number(number: str) -> str:
    """Return SQL for an `int8` from 0 on as a varint: of four bytes, eight, or nine."""
    ninth = f"substr(int8send({number} >> 56), 8, 1)"
    return f"""
    CASE WHEN {number} < {1 << 28} THEN {_varint(f"{number}::int4", _SHORT)}
         WHEN {number} < {1 << 56} THEN {_varint(number, _LONG)}
         ELSE {_varint(number, _LONG, goes_on=True)} || {ninth} END"""


def _length(number: str) -> str:
    """Return SQL for an `int4` below 2^28 as a varint: of two bytes, or four."""
    two = f"int2send(((({number} & 127) << 8 | ({number} >> 7)) - 32768)::int2)"
    return f"CASE WHEN {number} < {1 << 14} THEN {two} ELSE {_varint(number, _SHORT)} END"


def _tag(field: int, kind: int) -> str:
    return f"'\\x{field << 3 | kind:02x}'::bytea"


def _bytes(field: int, value: str) -> str:
    return f"{_tag(field, _LENGTH_DELIMITED)} || {_length(f'octet_length({value})')} || {value}"


def _text(field: int, column: str) -> str:
    length = _length(f"octet_length({column})")
    return f"{_tag(field, _LENGTH_DELIMITED)} || {length} || convert_to({column}, 'UTF8')"


def _or_nothing(field: str) -> str:
    return f"coalesce({field}, '')"


# The time is a message of two fields, each a tag and eight bytes.
_EVENT = " || ".join(
    (
        f"{_tag(1, _VARINT)} || {_number('id')}",
        f"(SELECT {_tag(2, _VARINT)} || {_number('%(session_id)s')})",  # once for all
        f"{_tag(3, _VARINT)} || {_number('server_seq')}",
        _or_nothing(_text(4, "actor_id")),
        _or_nothing(f"{_tag(5, _VARINT)} || ({_number('client_seq')})"),
        _or_nothing(_text(6, "type")),
        _or_nothing(_text(9, "hash")),
        _or_nothing(_bytes(10, "signature")),
        _or_nothing(_text(11, "idempotency_key")),
        f"{_tag(12, _LENGTH_DELIMITED)} || '\\x12'::bytea",
        f"{_tag(1, _VARINT)} || {_varint('(micros / 1000000)', _LONG, groups=5)}",
        f"{_tag(2, _VARINT)} || {_varint('(mod(micros, 1000000) * 1000)', _LONG, groups=5)}",
        f"{_tag(13, _LENGTH_DELIMITED)} || '\\x20'::bytea || chain_hash",
        f"coalesce({_text(7, 'payload_json')}, {_bytes(8, 'payload_binary')})",
    )
)


def events_sql(rows: str) -> str:
    """Return SQL for a row with the events of other rows as `repeated Event events = 1`, with their count, the number
    of the last one, and the bytes of their payloads.

    Args:
        rows: SQL for rows with `EVENT_COLUMNS` and `size`, all of the session `%(session_id)s`.
    """
    # OFFSET 0 keeps what is computed in a step from being computed again wherever the next one mentions it.
    # (A time as double precision is exact to the microsecond until the year 2255.)
    return f"""
    SELECT string_agg({_bytes(1, "event")}, '' ORDER BY server_seq), count(*), max(server_seq), sum(size)::bigint
    FROM (
        SELECT server_seq, size, {_EVENT} AS event
        FROM (
            SELECT {", ".join(EVENT_COLUMNS)}, size, round(date_part('epoch', created_at) * 1000000)::bigint AS micros
            FROM ({rows}) AS read OFFSET 0
        ) AS timed OFFSET 0
    ) AS encoded
    """
