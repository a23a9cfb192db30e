"""Payloads pass through as the text that they are: whatever a JSON object may look like, it comes back the same."""

import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import JSON, new_session
from tests.rpc.calls import events as stored_events

_LINE_BREAKS = str.maketrans("\r\n", "  ")
_LINE_BREAKS_IN_BYTES = bytes.maketrans(b"\r\n", b"  ")
_MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)

spaces = st.text(" \t\r\n", max_size=3)
numbers = st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
escapes = st.sampled_from(
    [
        r"\"",
        r"\\",
        r"\/",
        r"\b",
        r"\f",
        r"\n",
        r"\r",
        r"\t",
        r"\u0000",
        r"\u001f",
        r"\u2028",
        r"\uD83D\ude00",
        r"\uFFFF",
    ]
)
characters = st.characters(exclude_characters='"\\', exclude_categories=("Cs", "Cc")).filter(lambda c: c >= " ")
strings = st.lists(st.text(characters, max_size=8) | escapes, max_size=4).map(lambda parts: f'"{"".join(parts)}"')
atoms = (
    st.sampled_from(["null", "true", "false", "1.0", "-0", "1e400", "9007199254740993", "{}", "[]"]) | numbers | strings
)


def _spaced(draw: st.DrawFn, *tokens: str) -> str:
    return "".join(token + draw(spaces) for token in tokens)


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[str]) -> str:
    """The text of an array."""
    return "[" + draw(spaces) + ",".join(_spaced(draw, "", item) for item in draw(st.lists(items, max_size=4))) + "]"


@st.composite
def objects(draw: st.DrawFn, items: st.SearchStrategy[str]) -> str:
    """The text of an object, in which a key may stand twice."""
    keys = strings | st.sampled_from(['"a"', '"payload"', '"sessionId"', '""'])
    members = draw(st.lists(st.tuples(keys, items), max_size=4))
    return "{" + draw(spaces) + ",".join(_spaced(draw, "", key, ":", item) for key, item in members) + "}"


values = st.recursive(atoms, lambda items: arrays(items) | objects(items), max_leaves=12)
payloads = objects(values)


class _Event(msgspec.Struct):
    """What an answer says of an event; the payload as the text that it is."""

    payload: msgspec.Raw


def payload_of(event: bytes) -> str:
    """Return the text of an event's payload."""
    return bytes(msgspec.json.decode(event, type=_Event).payload).decode()


def tokens(text: str) -> Any:
    """Return what a JSON text says, numbers as they are written and keys as often as they stand there."""
    return json.loads(text, object_pairs_hook=list, parse_int=str, parse_float=str)


@pytest.fixture(scope="module")
def shared_session(http: httpx.Client) -> int:
    """A session for all examples."""
    return new_session(http)


@_MANY
@example(payload='{"a":1.0,"a":9007199254740993,"b":1e400,"c":-0,"\\u0000":"\\ud83d\\ude00\U0001f600"}')
@example(payload='{\r\n"a"\r:\n[\t 1\r,\n\n2 ]\r\n}')
@example(payload='{"a":' * 128 + "1" + "}" * 128)
@given(payload=payloads)
def test_any_object_comes_back(http: httpx.Client, stub: CollabServiceStub, shared_session: int, payload: str) -> None:
    """Byte for byte over gRPC, as the answer to the append and in an array; in lines and server-sent events as well,
    but that raw line breaks between tokens become spaces there, which makes an event one line.
    """
    body = f' {{"payload" :\n {payload} , "sessionId":{shared_session}}}\n'.encode()
    posted = http.post("/api/collab/events", content=body, headers=JSON)
    assert posted.status_code == 201, posted.text
    number = posted.json()["serverSeq"]
    assert payload_of(posted.content) == payload
    line = posted.content.translate(_LINE_BREAKS_IN_BYTES)
    assert payload_of(line) == payload.translate(_LINE_BREAKS)
    assert tokens(payload.translate(_LINE_BREAKS)) == tokens(payload)

    def listed(accept: str) -> bytes:
        query = {"sessionId": shared_session, "sinceServerSeq": number - 1, "limit": 1}
        answer = http.get("/api/collab/events", params=query, headers={"accept": accept})
        assert answer.status_code == 200
        return answer.content

    (item,) = msgspec.json.decode(listed("application/json"), type=list[msgspec.Raw])
    assert bytes(item) == posted.content
    assert listed("application/x-ndjson") == line + b"\n"
    retry, event, *_ = listed("text/event-stream").split(b"\n\n")
    assert retry == b"retry: 2000"
    assert event == b"id: %d\ndata: %b" % (number, line)
    (stored,) = stored_events(stub, shared_session, since_server_seq=number - 1)
    assert stored.json == payload


@_MANY
@given(batch=st.lists(payloads, min_size=1, max_size=5))
def test_any_batch_comes_back(http: httpx.Client, stub: CollabServiceStub, batch: list[str]) -> None:
    """Every payload of a batch is kept as it is, too."""
    session_id = new_session(http)
    body = "[" + ", ".join(f'{{"payload":{payload}}}' for payload in batch) + "]"
    stored = http.post(f"/api/collab/sessions/{session_id}/events", content=body.encode(), headers=JSON)
    assert stored.status_code == 201, stored.text
    assert [event.json for event in stored_events(stub, session_id)] == batch
    listed = http.get("/api/collab/events", params={"sessionId": session_id}).content
    texts = [payload_of(bytes(item)) for item in msgspec.json.decode(listed, type=list[msgspec.Raw])]
    assert texts == batch


@_MANY
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "actorId": st.text(min_size=1, max_size=60),
            "type": st.text(min_size=1, max_size=60),
            "hash": st.text(max_size=60),
            "clientSeq": st.integers(0, 2**63 - 1),
        },
    ).filter(lambda fields: not any("\0" in str(value) for value in fields.values()))
)
def test_any_text_in_the_other_fields_comes_back(
    http: httpx.Client, shared_session: int, fields: dict[str, Any]
) -> None:
    """Any Unicode, and numbers up to 2^63 - 1, in the fields beside the payload."""
    for ascii_only in (True, False):
        body = json.dumps({"sessionId": shared_session, **fields}, ensure_ascii=ascii_only).encode()
        posted = http.post("/api/collab/events", content=body, headers=JSON)
        assert posted.status_code == 201, posted.text
        assert posted.json().items() >= fields.items()
        assert posted.content.count(b"\n") == 0
