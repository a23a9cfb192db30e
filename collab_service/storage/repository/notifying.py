"""The statements with which processes tell each other that sessions have changed."""

from collections.abc import Collection
from itertools import islice

from collab_service.storage.binary import TEXT_ARRAY, text_array
from collab_service.storage.database import DriverConnection
from collab_service.storage.pipeline import Command, PipelineConnection, Statement

_CHANNEL = "collab_sessions"
_IDS_IN_PAYLOAD = 350
"""So many numbers of 19 digits, with a space each, stay below the 8,000 bytes that a payload may have."""


_NOTIFY = Statement(
    b"notify", f"SELECT pg_notify('{_CHANNEL}', payload) FROM unnest($1) AS payload".encode(), (TEXT_ARRAY,)
)
_NO_FLUSH = Command(Statement(b"no_flush", b"SET synchronous_commit = off"))


async def listen(connection: DriverConnection) -> None:
    """Make the connection, which commits by itself, receive what `notify` sends."""
    await connection.execute(f"LISTEN {_CHANNEL}")


async def commit_without_flush(connection: PipelineConnection) -> None:
    """Make commits on this connection return before they are on the disk, which is enough for what is only a hint."""
    await connection.run(_NO_FLUSH)


async def notify(connection: PipelineConnection, session_ids: Collection[int]) -> None:
    """Tell all listening connections that these sessions have changed."""
    left = iter(session_ids)
    payloads = []
    while some := list(islice(left, _IDS_IN_PAYLOAD)):
        payloads.append(" ".join(map(str, some)))
    await connection.run(Command(_NOTIFY, [text_array(payloads)]))


def session_ids_of(payload: str) -> list[int] | None:
    """Return the sessions that a notification names; None when it is none of ours."""
    try:
        return [int(word) for word in payload.split()]
    except ValueError:
        return None
