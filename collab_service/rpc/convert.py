"""From the model to protobuf messages."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from collab_service.log.decide import Appended
from collab_service.log.reading import Chunk, Page
from collab_service.model import Event, Session
from collab_service.v1 import collab_service_pb2 as pb


def timestamp(micros: int) -> Timestamp:
    """Return microseconds of the Unix epoch as a `Timestamp`."""
    seconds, rest = divmod(micros, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1_000)


def session_message(session: Session) -> pb.Session:
    """Return a session as a message."""
    return pb.Session(
        id=session.id,
        language_id=session.language_id,
        owner_id=session.owner_id,
        room=session.room,
        create_time=timestamp(session.created_at),
        last_active_time=timestamp(session.last_active),
        first_server_seq=session.first_server_seq,
        last_server_seq=session.last_server_seq,
        chain_hash=session.chain_hash,
    )


def event_message(event: Event) -> pb.Event:
    """Return a stored event as a message."""
    content = event.content
    payload = content.payload
    message = pb.Event(
        id=event.id,
        session_id=event.session_id,
        server_seq=event.server_seq,
        actor_id=content.actor_id,
        client_seq=content.client_seq,
        type=content.type,
        hash=content.hash,
        signature=content.signature,
        idempotency_key=content.idempotency_key,
        create_time=timestamp(event.created_at),
        chain_hash=event.chain_hash,
    )
    if isinstance(payload, str):
        message.json = payload
    else:
        message.binary = payload
    return message


def appended_message(appended: Appended) -> pb.AppendEventsResponse:
    """Return what became of a batch as a message."""
    first, last = appended.events[0], appended.events[-1]
    return pb.AppendEventsResponse(
        first_server_seq=first.server_seq,
        last_server_seq=last.server_seq,
        create_time=timestamp(first.created_at),
        replayed=appended.replayed,
    )


class PageEncoder:
    """Encodes pages of events; one that goes to many readers, one after the other, only once."""

    def __init__(self) -> None:
        self._last: tuple[Sequence[Chunk], int, int] | None = None
        self._last_message = b""

    def encode(self, page: Page) -> bytes:
        """Return a page as the bytes of a `ListEventsResponse`."""
        if not (page.chunks and page.chunks[0].events):
            return _page_bytes(page)
        this = page.chunks, page.through, page.head
        if this != self._last:
            self._last, self._last_message = this, _page_bytes(page)
        return self._last_message


def _page_bytes(page: Page) -> bytes:
    """Encode a page.

    The events of a chunk are encoded once, whoever they go to. Encoded messages that are put one after the other are
    one message (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
    """
    bookmark = pb.ListEventsResponse(through_server_seq=page.through, head_server_seq=page.head)
    return b"".join((*map(_chunk_bytes, page.chunks), bookmark.SerializeToString()))


def _chunk_bytes(chunk: Chunk) -> bytes:
    if chunk.encoded is None:
        chunk.encoded = pb.ListEventsResponse(events=map(event_message, chunk.events)).SerializeToString()
    return chunk.encoded
