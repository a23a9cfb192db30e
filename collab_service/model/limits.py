"""How much the service accepts."""

from dataclasses import dataclass

MAX_INT64 = 2**63 - 1
MAX_JSON_DEPTH = 128
MAX_EVENT_TYPES = 1_000
"""Types that one read can ask for."""

DEFAULT_MAX_CONNECTIONS = 10_000
"""Connections at once at each port of a process."""
DEFAULT_MAX_FOLLOWERS = 10_000
"""Follows at once in one process."""
DEFAULT_MAX_MEMORY_BYTES = 1024 * 1024 * 1024
"""Resident memory of a process, from where on calls that wait for their clients are ended."""
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on accepted input, in bytes of UTF-8 unless said otherwise."""

    event_bytes: int = 1024 * 1024
    """The payload of one event."""
    batch_events: int = 1_000
    """Events in a batch (a count)."""
    batch_bytes: int = 4 * 1024 * 1024
    """The payloads of a batch together."""
    text_bytes: int = 255
    """`room`, `idempotency_key`, `actor_id`, `owner_id`, `type` and `hash`."""
    signature_bytes: int = 1024
    message_bytes: int = 8 * 1024 * 1024
    """A received gRPC message."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait in this process or be under way, counted until it is answered."""

    requests: int = 4_096
    bytes: int = 64 * 1024 * 1024
    session_requests: int = 2_048
    """Of one session, which may not take more than it leaves free either, so that those that are stuck leave room."""
    session_bytes: int = 16 * 1024 * 1024
    transaction_sessions: int = 1_000
    """Sessions that one append transaction may span."""
