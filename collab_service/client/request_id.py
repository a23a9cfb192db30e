"""The name under which calls stand in the service's log."""

from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("collab_request_id", default=None)
"""Names the calls that are made in this context; the service makes a name up where there is none. At most 128 visible
ASCII characters."""


def call_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call."""
    name = request_id.get()
    return () if name is None else (("x-request-id", name),)
