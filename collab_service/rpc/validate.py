"""From requests to the model: every field checked, all that is wrong told at once."""

from collections.abc import Sequence

from collab_service.log.decide import AppendRequest
from collab_service.model import EMPTY_PAYLOAD, Limits, ListPosition, NewEvent
from collab_service.model.errors import InvalidArgument, Reason, Violation
from collab_service.model.limits import DEFAULT_PAGE_SIZE, MAX_EVENT_TYPES, MAX_PAGE_SIZE
from collab_service.model.payload import json_object_problem
from collab_service.rpc.page_token import read_page_token
from collab_service.v1 import collab_service_pb2 as pb


class Check:
    """Collects what is wrong with one request. Every method returns the value that it was asked about."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._violations: list[Violation] = []

    def __enter__(self) -> "Check":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Raise `InvalidArgument` if anything was wrong."""
        if self._violations and error is None:
            raise InvalidArgument(self._violations)

    def wrong(self, field: str, message: str, reason: Reason = Reason.INVALID_REQUEST) -> None:
        """Note that a field is wrong, and what would be right."""
        self._violations.append(Violation(field, message, reason))

    def at_least(self, minimum: int, field: str, value: int) -> int:
        """Check a number."""
        if value < minimum:
            self.wrong(field, f"must be at least {minimum}, not {value}")
        return value

    def text(self, field: str, value: str, *, may_be_empty: bool = False) -> str:
        """Check a short text."""
        limit = self._limits.text_bytes
        if not value and not may_be_empty:
            self.wrong(field, "must not be empty")
        if "\0" in value:
            self.wrong(field, "must not hold a NUL character")
        # A character has at most four bytes, so that short texts need no encoding.
        if 4 * len(value) > limit and (size := len(value.encode())) > limit:
            self.wrong(field, f"must be at most {limit} bytes of UTF-8, not {size}")
        return value

    def append(
        self, request: pb.AppendEventRequest | pb.AppendEventsRequest, events: Sequence[NewEvent]
    ) -> AppendRequest:
        """Check what every append has."""
        expected = None
        if request.HasField("expected_last_server_seq"):
            expected = self.at_least(0, "expected_last_server_seq", request.expected_last_server_seq)
        return AppendRequest(self.at_least(1, "session_id", request.session_id), events, request.ByteSize(), expected)

    def event(self, path: str, message: pb.NewEvent) -> tuple[NewEvent, int]:
        """Check an event; return it and the bytes of its payload."""
        present = message.HasField
        payload, size = self._payload(path, message)
        event = NewEvent(
            self.text(path + ".actor_id", message.actor_id) if present("actor_id") else None,
            self.at_least(0, path + ".client_seq", message.client_seq) if present("client_seq") else None,
            self.text(path + ".type", message.type) if present("type") else None,
            payload,
            self.text(path + ".hash", message.hash, may_be_empty=True) if present("hash") else None,
            message.signature,
            self.text(path + ".idempotency_key", message.idempotency_key) if present("idempotency_key") else None,
        )
        if len(event.signature) > self._limits.signature_bytes:
            self.wrong(
                path + ".signature",
                f"must be at most {self._limits.signature_bytes} bytes, not {len(event.signature)}",
            )
        return event, size

    def _payload(self, path: str, message: pb.NewEvent) -> tuple[str | bytes, int]:
        kind = message.WhichOneof("payload")
        if kind is None:
            return EMPTY_PAYLOAD, len(EMPTY_PAYLOAD)
        payload = message.json if kind == "json" else message.binary
        size = len(payload) if isinstance(payload, bytes) or payload.isascii() else len(payload.encode())
        if size > self._limits.event_bytes:
            self.wrong(
                f"{path}.{kind}",
                f"must be at most {self._limits.event_bytes} bytes, not {size}",
                Reason.EVENT_TOO_LARGE,
            )
        elif isinstance(payload, str) and (problem := json_object_problem(payload)) is not None:
            self.wrong(f"{path}.{kind}", problem, Reason.PAYLOAD_NOT_A_JSON_OBJECT)
        return payload, size

    def batch(self, messages: Sequence[pb.NewEvent]) -> list[NewEvent]:
        """Check a batch of events."""
        limits = self._limits
        if not messages:
            self.wrong("events", "must hold at least one event")
        if len(messages) > limits.batch_events:
            # What lies beyond the limit is not looked at: it may be a great deal.
            self.wrong(
                "events",
                f"must be at most {limits.batch_events} events, not {len(messages)}",
                Reason.BATCH_TOO_LARGE,
            )
            return []
        events, total = [], 0
        first_with: dict[str, int] = {}
        for index, message in enumerate(messages):
            event, size = self.event(f"events[{index}]", message)
            events.append(event)
            total += size
            key = event.idempotency_key
            if key is not None and (first := first_with.setdefault(key, index)) != index:
                self.wrong(
                    f"events[{index}].idempotency_key",
                    f"must be its own; events[{first}] has the same",
                )
        if total > limits.batch_bytes:
            self.wrong(
                "events",
                f"must be at most {limits.batch_bytes} bytes of payloads together, not {total}",
                Reason.BATCH_TOO_LARGE,
            )
        return events

    def page_size(self, value: int) -> int:
        """Check a page size; 0 means the default, and too many are cut."""
        return min(self.at_least(0, "page_size", value) or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)

    def page_token(self, token: str, filters: object) -> ListPosition | None:
        """Check a page token against the filters of this call; an empty one asks for the first page."""
        place = read_page_token(token, filters) if token else None
        if token and place is None:
            what = "must be the next_page_token of a call with the same filters, or empty for the first page"
            self.wrong("page_token", what, Reason.PAGE_TOKEN_INVALID)
        return place

    def types(self, values: Sequence[str]) -> list[str]:
        """Check a filter of event types."""
        if len(values) > MAX_EVENT_TYPES:
            self.wrong("types", f"must be at most {MAX_EVENT_TYPES} types, not {len(values)}")
            return []
        return [self.text(f"types[{index}]", value) for index, value in enumerate(values)]


def session_of(append: bytes) -> int | None:
    """Return the session of an append that is not decoded, if that is its first field, as encoders write it."""
    if append[:1] != b"\x08":  # the tag of field 1, a varint
        return None
    number = 0
    for place, byte in enumerate(append[1:11]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number
    return None
