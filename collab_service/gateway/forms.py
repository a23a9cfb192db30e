"""What requests bring, as types: they decode and validate requests, and the OpenAPI document is generated from them."""

from functools import cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

MAX_INT64 = 2**63 - 1

Id = Annotated[int, Meta(ge=1, le=MAX_INT64, description="A number from 1 on.")]
Count = Annotated[int, Meta(ge=0, le=MAX_INT64, description="A number from 0 on.")]
Expected = Annotated[Count, Meta(description="Append only if this is the session's last number; 0: if it is empty.")]
Name = Annotated[str, Meta(min_length=1, description="At most 255 bytes of UTF-8, no NUL character.")]
Base64 = Annotated[str, Meta(description="Bytes in base64.")]
JsonObject = Annotated[
    Raw,
    Meta(
        description="A JSON object, kept as the text that it is. Absent, with no payloadBase64 either, it means {}.",
        extra_json_schema={"type": ["object", "null"]},
    ),
]
ABSENT = Raw(b"null")


class SessionBody(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A session to create."""

    language_id: Id | None = None
    owner_id: Name | None = None
    room: Name | None = None


class EventBody(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """An event of a batch to append."""

    actor_id: Name | None = None
    client_seq: Count | None = None
    type: Name | None = None
    payload: JsonObject = msgspec.field(default_factory=lambda: ABSENT)
    payload_base64: Base64 | None = None
    hash: str | None = None
    signature: Base64 | None = None
    idempotency_key: Name | None = None


class SessionEventBody(EventBody, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """An event to append."""

    session_id: Id
    expected_last_server_seq: Expected | None = None


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class MetricsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose metrics to show."""

    per: Literal["worker"] | None = None


class SessionsQuery(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Which sessions to list."""

    language_id: Id | None = None
    owner_id: Name | None = None
    page_size: Annotated[int, Meta(ge=1, le=2**31 - 1, description="One page, of at most so many (1,000).")] | None = (
        None
    )
    page_token: Annotated[str, Meta(description="From the Link header of the page before.")] | None = None


class BatchQuery(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Where to append."""

    expected_last_server_seq: Expected | None = None


class EventsQuery(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Which events to list."""

    session_id: Id
    since_server_seq: Annotated[Count, Meta(description="Begin after this number; 0 is the beginning.")] = 0
    limit: Annotated[Count, Meta(description="End after so many events; 0 means all.")] = 0
    types: Annotated[Name, Meta(description="Only events of these types, separated by commas.")] | None = None


class BatchAnswer(Struct, frozen=True, rename="camel"):
    """Where a batch is stored."""

    first_server_seq: int
    last_server_seq: int
    created_at: str


class ReleasedAnswer(Struct, frozen=True, rename="camel"):
    """How many sessions a user has owned."""

    sessions_released: int


class Detail(Struct, frozen=True):
    """One bad field."""

    field: Annotated[str, Meta(description="Its name, such as sessionId or, in a batch, [3].actorId.")]
    message: Annotated[str, Meta(description="What is wrong and what would be right.")]


class ErrorAnswer(Struct, frozen=True):
    """What went wrong."""

    error: Annotated[str, Meta(description="In a few words.")]
    message: Annotated[str, Meta(description="In a sentence.")]
    code: Annotated[str, Meta(description="For programs: an ErrorReason of the protos, or one of HTTP's own.")]
    details: Annotated[list[Detail], Meta(description="Every bad field.")]


WHAT_IS_RIGHT = {
    "sessionId": "a whole number from 1 to 2^63 - 1",
    "id": "a whole number from 1 to 2^63 - 1",
    "languageId": "a whole number from 1 to 2^63 - 1",
    "clientSeq": "a whole number from 0 to 2^63 - 1",
    "sinceServerSeq": "a whole number from 0 to 2^63 - 1",
    "expectedLastServerSeq": "a whole number from 0 to 2^63 - 1",
    "limit": "a whole number from 0 to 2^63 - 1",
    "pageSize": "a whole number from 1 to 2^31 - 1",
    "payload": "a JSON object",
    "payloadBase64": "bytes in base64 (RFC 4648, with padding)",
    "signature": "bytes in base64 (RFC 4648, with padding)",
    "hash": "a string",
    "pageToken": "a string",
    "per": "worker, or not be given",
}
"""By field; every other is a string that is not empty."""


@cache
def fields_of(form: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """Return the fields of a form by the names that requests use."""
    return {field.encode_name: field for field in msgspec.structs.fields(form)}
