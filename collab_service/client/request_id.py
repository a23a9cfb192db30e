"""The name under which calls stand in the service's log."""

import re
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("collab_request_id", default=None)
"""Names the calls that are made in this context; the service makes a name up where there is none, or where it is not 1
to 128 visible ASCII characters."""

_NAME = re.compile(r"[\x21-\x7e]{1,128}")


def call_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call."""
    name = request_id.get()
    # What no header can hold would not even be sent, and a name for the log is no reason for a call to fail.
    return () if name is None or not _NAME.fullmatch(name) else (("x-request-id", name),)
