"""Open files: every connection is one, and a process that can open none any more does not live for long."""

import resource

import structlog

_log = structlog.get_logger(__name__)

_OTHER_FILES = 100
"""What a process opens besides connections of clients and those of the pool."""
_PORTS = 2


def connections_that_fit(wanted: int, pool_size: int = 0) -> int:
    """Return how many connections each port may have: `wanted`, or fewer where the limit on open files is lower.

    The soft limit is raised as far as that takes, and the system lets us.
    """
    other = _OTHER_FILES + pool_size
    needed = other + _PORTS * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            fitting = max((soft - other) // _PORTS, 1)
            _log.info("fewer connections than configured, by the limit on open files", connections=fitting, files=soft)
            return fitting
    return wanted
