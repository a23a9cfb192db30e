"""A clock that jumps: Python runs this at the start of a run's service, whose search path has this directory."""

import os
import time

_file = os.open(os.environ["TORTURE_CLOCK"], os.O_RDONLY)
_time_ns = time.time_ns


def _jumping_time_ns() -> int:
    """Return the time, with as many nanoseconds more as stand in the file."""
    return _time_ns() + int(os.pread(_file, 32, 0))


time.time_ns = _jumping_time_ns
