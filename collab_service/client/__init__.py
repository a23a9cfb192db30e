"""The Python client of collab-service, for other services: typed, retrying, resuming.

::

    async with CollabClient("127.0.0.1:50051") as client:
        session, _ = await client.create_session(room="minutes")
        await client.append(session.id, NewEvent.of({"text": "hello"}, actor_id="ada"))
        async for event in client.follow(session.id):
            print(event.server_seq, event.value())

`docs/client.md` has more.
"""

from collab_service.client.appender import Appender
from collab_service.client.check import BrokenLog, LogCheck
from collab_service.client.client import DEFAULT_TARGET, END, CollabClient
from collab_service.client.errors import (
    DeadlineExceeded,
    IdempotencyKeyReused,
    InternalError,
    InvalidRequest,
    OutcomeUnknown,
    Overloaded,
    ServerSeqBeyondHead,
    ServerSeqCompacted,
    ServerSeqConflict,
    ServiceError,
    SessionNotFound,
    TooLarge,
    Unavailable,
    Violation,
)
from collab_service.client.request_id import request_id
from collab_service.client.retry import RetryPolicy
from collab_service.client.values import (
    Acknowledged,
    Appended,
    AppendedBatch,
    CreatedSession,
    Event,
    EventPage,
    NewEvent,
    Session,
    SessionPage,
)

__all__ = [
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
