"""Columns of values packed as PostgreSQL's binary arrays.

One statement inserts any number of events: each column travels as one array in PostgreSQL's binary format, which
`unnest` turns into rows. Packing the arrays here costs about a third of what an ORM's or the driver's own row-by-row
adaptation does, and their types are the same whatever they hold, so that the statement is prepared once.

The format: `array_send` and `array_recv` in PostgreSQL's src/backend/utils/adt/arrayfuncs.c. A header of five 32-bit
integers (dimensions, has-nulls flag, element OID, length, lower bound), then each element's length and bytes; the
length -1 is a NULL.
"""

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_header = Struct(">iiIii").pack
_length = Struct(">i").pack
_int8 = Struct(">iq").pack
_NULL = b"\xff\xff\xff\xff"
_POSTGRES_EPOCH = 946_684_800_000_000  # 2000-01-01, from which timestamps count microseconds

_INT8, _TEXT, _BYTEA, _TIMESTAMPTZ = 20, 25, 17, 1184  # OIDs from pg_type.dat


class PackedArray(bytes):
    """A packed array; its subclasses name its type to the driver."""


class Int8Array(PackedArray):
    """A packed `int8[]`."""


class TextArray(PackedArray):
    """A packed `text[]`."""


class ByteaArray(PackedArray):
    """A packed `bytea[]`."""


class TimestamptzArray(PackedArray):
    """A packed `timestamptz[]`."""


def _dumper(array_oid: int) -> type[Dumper]:
    class ArrayDumper(Dumper):
        format = Format.BINARY
        oid = array_oid

        def dump(self, obj: PackedArray) -> PackedArray:
            return obj

    return ArrayDumper


_DUMPERS = {
    Int8Array: _dumper(1016),
    TextArray: _dumper(1009),
    ByteaArray: _dumper(1001),
    TimestamptzArray: _dumper(1185),
}


def register_arrays(connection: psycopg.AsyncConnection[Any]) -> None:
    """Teach a connection to send packed arrays."""
    for array, dumper in _DUMPERS.items():
        connection.adapters.register_dumper(array, dumper)


def _pack(element_oid: int, elements: Sequence[bytes]) -> bytes:
    return _header(1, 1, element_oid, len(elements), 1) + b"".join(elements)


def int8_array(values: Iterable[int | None]) -> Int8Array:
    """Pack an `int8[]`."""
    return Int8Array(_pack(_INT8, [_NULL if value is None else _int8(8, value) for value in values]))


def timestamptz_array(micros: Iterable[int]) -> TimestamptzArray:
    """Pack a `timestamptz[]` from microseconds of the Unix epoch."""
    return TimestamptzArray(_pack(_TIMESTAMPTZ, [_int8(8, value - _POSTGRES_EPOCH) for value in micros]))


def bytea_array(values: Iterable[bytes | None]) -> ByteaArray:
    """Pack a `bytea[]`."""
    return ByteaArray(_pack(_BYTEA, [_NULL if value is None else _length(len(value)) + value for value in values]))


def text_array(values: Iterable[str | None]) -> TextArray:
    """Pack a `text[]`."""
    encoded = (None if value is None else value.encode() for value in values)
    return TextArray(_pack(_TEXT, [_NULL if value is None else _length(len(value)) + value for value in encoded]))
