"""PostgreSQL's binary format, for the statements where every microsecond counts.

Columns of values travel as arrays, which `unnest` turns into rows: one statement for any number of rows, prepared once,
at about a third of what an ORM's or the driver's row-by-row adaptation costs. An array is a header of five 32-bit
integers (dimensions, has-nulls flag, element OID, length, lower bound), then each element's length and bytes, the
length -1 being a NULL (`array_recv` in PostgreSQL's src/backend/utils/adt/arrayfuncs.c). Integers are big-endian; a
timestamptz is the microseconds since 2000.

A column of nothing but NULLs travels as an empty array: where `unnest` gets arrays of different lengths, it fills the
shorter ones up with NULLs, and most batches leave several columns empty.
"""

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, TypeVar

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format

# OIDs, from src/include/catalog/pg_type.dat.
INT8, TEXT = 20, 25
_BYTEA, _TIMESTAMPTZ = 17, 1184
INT8_ARRAY, TEXT_ARRAY, BYTEA_ARRAY, TIMESTAMPTZ_ARRAY = 1016, 1009, 1001, 1185

_NULL = b"\xff\xff\xff\xff"
_POSTGRES_EPOCH = 946_684_800_000_000

T = TypeVar("T")

_header = Struct(">iiIii").pack
_header_of_empty = Struct(">iiI").pack
_length = Struct(">i").pack
_read_sized_int8 = Struct(">iq").iter_unpack
_HEADER_BYTES = 20
_length_and_int8 = Struct(">iq").pack


def _array(element: int, values: Sequence[T], pack: Callable[[T], bytes]) -> bytes:
    first = list(values[:1])
    if first and first * len(values) == list(values):  # as in many batches; it ends at the first that is another
        if first == [None]:
            return _header_of_empty(0, 0, element)
        packed = pack(first[0]) * len(values)
    else:
        packed = b"".join(map(pack, values))
    return _header(1, 1, element, len(values), 1) + packed


def int8_array(values: Sequence[int | None]) -> bytes:
    """Pack an `int8[]`."""
    return _array(INT8, values, _sized_int8)


def timestamptz_array(micros: Sequence[int]) -> bytes:
    """Pack a `timestamptz[]` from microseconds of the Unix epoch."""
    return _array(_TIMESTAMPTZ, [value - _POSTGRES_EPOCH for value in micros], _sized_int8)


def bytea_array(values: Sequence[bytes | None]) -> bytes:
    """Pack a `bytea[]`."""
    return _array(_BYTEA, values, _sized_bytes)


def text_array(values: Sequence[str | None]) -> bytes:
    """Pack a `text[]`."""
    return _array(TEXT, values, _sized_text)


def _sized_int8(value: int | None) -> bytes:
    return _NULL if value is None else _length_and_int8(8, value)


def _sized_bytes(value: bytes | None) -> bytes:
    return _NULL if value is None else _length(len(value)) + value


def _sized_text(value: str | None) -> bytes:
    return _NULL if value is None else _sized_bytes(value.encode())


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
