"""What this process takes of the memory, where the system tells; and giving back what it needs no longer."""

import ctypes
import os
from pathlib import Path

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def tells_resident_bytes() -> bool:
    """Whether `resident_bytes` works here, which is on Linux."""
    return _STATM.exists()


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


def give_back() -> None:
    """Give the system what was freed, which glibc would keep for itself; takes up to a tenth of a second.

    Other C libraries have no such call (https://man7.org/linux/man-pages/man3/malloc_trim.3.html), and need none.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
