"""What the client's users import."""

import subprocess
import sys
from types import ModuleType

from collab_service import client
from tests.processes import clean_environment

PUBLIC = [
    "DEFAULT_TARGET",
    "END",
    "Acknowledged",
    "Appended",
    "AppendedBatch",
    "Appender",
    "BrokenLog",
    "CollabClient",
    "CreatedSession",
    "DeadlineExceeded",
    "Event",
    "EventPage",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidRequest",
    "LogCheck",
    "NewEvent",
    "OutcomeUnknown",
    "Overloaded",
    "RetryPolicy",
    "ServerSeqBeyondHead",
    "ServerSeqCompacted",
    "ServerSeqConflict",
    "ServiceError",
    "Session",
    "SessionNotFound",
    "SessionPage",
    "TooLarge",
    "Unavailable",
    "Violation",
    "request_id",
]


def test_the_public_names() -> None:
    """The names stay as they are, in order, and each is there; nothing else of ours is in the way."""
    assert client.__all__ == PUBLIC
    assert sorted(PUBLIC, key=lambda name: (not name.isupper(), name[0].islower(), name)) == PUBLIC
    names = {name for name, value in vars(client).items() if not isinstance(value, ModuleType)}
    assert {name for name in names if not name.startswith("_")} == set(PUBLIC)
    for name in PUBLIC:
        value = getattr(client, name)
        assert not isinstance(value, type) or value.__doc__


def test_what_it_imports() -> None:
    """Importing the client loads neither the database's libraries nor those of the service and the command line."""
    program = """
import sys
import collab_service.client
loaded = {name.partition(".")[0] for name in sys.modules}
unwanted = loaded & {"sqlalchemy", "psycopg", "alembic", "structlog", "typer", "rich", "uvloop"}
ours = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("collab_service.")}
print(sorted(unwanted), sorted(ours))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean_environment(), check=False
    )
    assert (result.stdout, result.stderr) == (
        "[] ['collab_service.client', 'collab_service.model', 'collab_service.v1']\n",
        "",
    )
