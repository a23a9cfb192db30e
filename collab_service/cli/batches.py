"""Events in batches that the service takes."""

from collections.abc import Iterable, Iterator

from collab_service.client import NewEvent

_BYTES = 2 * 1024 * 1024
"""Of payloads, where the service takes 4 MiB unless configured."""


def batches(events: Iterable[NewEvent], count: int) -> Iterator[list[NewEvent]]:
    """Yield the events in batches of so many at most, fewer where they are large."""
    batch: list[NewEvent] = []
    size = 0
    for event in events:
        weight = payload_size(event)
        if batch and (len(batch) == count or size + weight > _BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += weight
    if batch:
        yield batch


def payload_size(event: NewEvent) -> int:
    """Return the bytes of an event's payload."""
    payload = event.payload
    return len(payload) if isinstance(payload, bytes) else len(payload.encode())
