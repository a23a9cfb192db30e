"""Times in the database are `timestamptz`; everywhere else they are integers, microseconds of the Unix epoch."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import DateTime
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def now_micros() -> int:
    """Return the clock's time in microseconds."""
    return time.time_ns() // 1_000


def to_micros(moment: datetime) -> int:
    """Return an aware datetime as microseconds; exact, since integers do the arithmetic."""
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(micros: int) -> datetime:
    """Return microseconds as an aware datetime in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


class Microseconds(TypeDecorator[int]):
    """A `timestamptz` column whose values are microseconds in Python."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Convert for the driver."""
        return None if value is None else to_datetime(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        """Convert from the driver."""
        return None if value is None else to_micros(value)
