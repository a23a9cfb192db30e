"""Sessions, events, limits, errors and the chain. Plain values; knows nothing of gRPC or SQL."""

from collab_service.model.event import EMPTY_PAYLOAD, Event, ListPosition, NewEvent, Session
from collab_service.model.limits import Limits, QueueLimits

__all__ = ["EMPTY_PAYLOAD", "Event", "Limits", "ListPosition", "NewEvent", "QueueLimits", "Session"]
