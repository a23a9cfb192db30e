"""From messages back to the model."""

from collab_service.model import Event, NewEvent
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


def stored_event(event: pb.Event) -> Event:
    """Return an event as it is stored."""
    created_at = event.create_time.seconds * 1_000_000 + event.create_time.nanos // 1_000
    return Event(event.id, event.session_id, event.server_seq, created_at, event.chain_hash, content_of(event))
