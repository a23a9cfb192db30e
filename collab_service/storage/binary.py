"""PostgreSQL's binary format, for the statements where every microsecond counts.

Columns of values travel as arrays, which `unnest` turns into rows: one statement for any number of rows, prepared once,
at about a third of what an ORM's or the driver's row-by-row adaptation costs. An array is a header of five 32-bit
integers (dimensions, has-nulls flag, element OID, length, lower bound), then each element's length and bytes, the
length -1 being a NULL (`array_recv` in PostgreSQL's src/backend/utils/adt/arrayfuncs.c). Integers are big-endian; a
timestamptz is the microseconds since 2000.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Any

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format

# OIDs, from src/include/catalog/pg_type.dat.
INT8, TEXT = 20, 25
_BYTEA, _TIMESTAMPTZ = 17, 1184
INT8_ARRAY, TEXT_ARRAY, BYTEA_ARRAY, TIMESTAMPTZ_ARRAY = 1016, 1009, 1001, 1185

_NULL = b"\xff\xff\xff\xff"
_POSTGRES_EPOCH = 946_684_800_000_000

_header = Struct(">iiIii").pack
_length = Struct(">i").pack
_read_sized_int8 = Struct(">iq").iter_unpack
_HEADER_BYTES = 20
_sized_int8 = Struct(">iq").pack


def _array(element: int, count: int, elements: bytes) -> bytes:
    return _header(1, 1, element, count, 1) + elements


def _are_equal(values: Sequence[object]) -> bool:
    """Tell whether all values are the same, as they often are in a batch; ends at the first that is not."""
    return list(values[:1]) * len(values) == values


def int8_array(values: Sequence[int | None]) -> bytes:
    """Pack an `int8[]`."""
    return _array(INT8, len(values), _int8_elements(values))


def timestamptz_array(micros: Sequence[int]) -> bytes:
    """Pack a `timestamptz[]` from microseconds of the Unix epoch."""
    return _array(_TIMESTAMPTZ, len(micros), _int8_elements([value - _POSTGRES_EPOCH for value in micros]))


def _int8_elements(values: Sequence[int | None]) -> bytes:
    if values and _are_equal(values):
        return _int8_element(values[0]) * len(values)
    return b"".join(map(_int8_element, values))


def _int8_element(value: int | None) -> bytes:
    return _NULL if value is None else _sized_int8(8, value)


def bytea_array(values: Sequence[bytes | None]) -> bytes:
    """Pack a `bytea[]`."""
    if values and _are_equal(values):
        return _array(_BYTEA, len(values), _bytea_element(values[0]) * len(values))
    return _array(_BYTEA, len(values), b"".join(map(_bytea_element, values)))


def _bytea_element(value: bytes | None) -> bytes:
    return _NULL if value is None else _length(len(value)) + value


def text_array(values: Sequence[str | None]) -> bytes:
    """Pack a `text[]`."""
    if values and _are_equal(values):
        return _array(TEXT, len(values), _text_element(values[0]) * len(values))
    return _array(TEXT, len(values), b"".join(map(_text_element, values)))


def _text_element(value: str | None) -> bytes:
    return _NULL if value is None else _length(len(encoded := value.encode())) + encoded


def int8(value: int) -> bytes:
    """Pack an `int8`."""
    return value.to_bytes(8, signed=True)


def read_int8(value: bytes) -> int:
    """Unpack an `int8`."""
    return int.from_bytes(value, signed=True)


def read_int8_array(value: bytes) -> list[int]:
    """Unpack an `int8[]` without NULLs."""
    return [number for _, number in _read_sized_int8(value[_HEADER_BYTES:])]


def read_timestamptz(value: Buffer) -> int:
    """Unpack a `timestamptz` to microseconds of the Unix epoch."""
    return int.from_bytes(value, signed=True) + _POSTGRES_EPOCH


class _TimestamptzLoader(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> int:
        return read_timestamptz(data)


def load_times_as_micros(connection: psycopg.AsyncConnection[Any]) -> None:
    """Make binary cursors of a connection return microseconds for `timestamptz`."""
    connection.adapters.register_loader(_TIMESTAMPTZ, _TimestamptzLoader)
