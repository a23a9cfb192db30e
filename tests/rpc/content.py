"""From messages back to the model."""

from collab_service.model import NewEvent
from collab_service.v1 import collab_service_pb2 as pb


def content_of(event: pb.Event | pb.NewEvent) -> NewEvent:
    """Return what the author gave."""
    kind = event.WhichOneof("payload")
    return NewEvent(
        event.actor_id if event.HasField("actor_id") else None,
        event.client_seq if event.HasField("client_seq") else None,
        event.type if event.HasField("type") else None,
        "{}" if kind is None else event.json if kind == "json" else event.binary,
        event.hash if event.HasField("hash") else None,
        event.signature,
        event.idempotency_key if event.HasField("idempotency_key") else None,
    )
