"""Events as protobuf messages, made by PostgreSQL.

A list of events has nothing to decide about them. So each row has an envelope: the bytes of its message, as `Event` in
the protos and https://protobuf.dev/programming-guides/encoding/ describe them, up to the payload, which is the last
field and is not stored twice. A page of a list is envelopes and payloads, one after the other: PostgreSQL joins them in
0.7 µs an event, where making them of the columns takes 3, and turning the rows into Python objects and those into
messages 5.

The statement that inserts an event makes its envelope, of the columns and of nothing else. A row without one (written
by a version of the service that did not have them) has it made when it is read.

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
_MESSAGE_TO_PAYLOAD = " || ".join(
    (
        f"{_tag(1, _VARINT)} || {_number('id')}",
        f"{_tag(2, _VARINT)} || {_number('session_id')}",
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
        f"CASE WHEN payload_json IS NULL THEN {_tag(8, _LENGTH_DELIMITED)} ELSE {_tag(7, _LENGTH_DELIMITED)} END",
        _length("size"),
    )
)
SIZE = "coalesce(octet_length(payload_json), octet_length(payload_binary))"
"""SQL for the bytes of a row's payload."""


def with_envelopes(rows: str) -> str:
    """Return SQL for rows of `EVENT_COLUMNS` and their envelope, made of them.

    Args:
        rows: SQL for rows with `EVENT_COLUMNS`.
    """
    # OFFSET 0 keeps what is computed in a step from being computed again wherever the next one mentions it.
    # (A time as double precision is exact to the microsecond until the year 2255.)
    columns = ", ".join(EVENT_COLUMNS)
    return f"""
    SELECT {columns}, {_tag(1, _LENGTH_DELIMITED)} || {_length("(octet_length(message) + size)")} || message AS envelope
    FROM (
        SELECT {columns}, size, {_MESSAGE_TO_PAYLOAD} AS message
        FROM (
            SELECT {columns}, {SIZE} AS size, round(date_part('epoch', created_at) * 1000000)::bigint AS micros
            FROM ({rows}) AS plain OFFSET 0
        ) AS measured OFFSET 0
    ) AS begun
    """


def list_sql(rows: str) -> str:
    """Return SQL for a row with events as `repeated Event events = 1`, their count, and the number of the last one.

    Args:
        rows: SQL for rows with `EVENT_COLUMNS` and `envelope`, in their order.
    """
    made = with_envelopes(f"SELECT {', '.join('page.' + name for name in EVENT_COLUMNS)}")
    envelope = f"coalesce(page.envelope, (SELECT made.envelope FROM ({made}) AS made))"
    payload = "coalesce(convert_to(payload_json, 'UTF8'), payload_binary)"
    return f"""
    SELECT string_agg({envelope} || {payload}, '' ORDER BY server_seq), count(*), max(server_seq)
    FROM ({rows}) AS page
    """
