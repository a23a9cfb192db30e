"""What is refused: with which status and code, every bad field named at once, nothing stored, nothing internal told."""

import gzip
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import psycopg
import pytest

from tests.client.answering import AnsweringService, Refusal
from tests.gateway.calls import JSON, TIMEOUT, answered, append, append_batch, events, new_session, refused, session
from tests.gateway.conftest import SMALL_BODY
from tests.processes import GatewayProcess, ServeProcess

_DEEP = 100_000
_NUMBER = "a whole number from"


@pytest.fixture(scope="module")
def session_id(http: httpx.Client) -> int:
    """A session with one event, which has to be all it ever has."""
    session_id = new_session(http)
    append(http, session_id)
    return session_id


@contextmanager
def nothing_stored(http: httpx.Client, session_id: int) -> Iterator[None]:
    """Assert that a session does not change in the block."""
    before = session(http, session_id)
    yield
    assert session(http, session_id) == before


def post(http: httpx.Client, body: str | bytes, path: str = "/api/collab/events", **headers: str) -> httpx.Response:
    """Post a body as it is."""
    return http.post(path, content=body, headers=JSON | headers)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("sessionId", value, _NUMBER)
        for value in (
            "0", "-1", "1.5", "1.0", "1e0", '"1"', "true", "null", "[]", "{}", str(2**63), "9" * 5_000, "1e400",
        )
    ]
    + [("clientSeq", value, _NUMBER) for value in ("-1", "0.0", '"0"', str(2**63), "-" + "9" * 5_000)]
    + [("expectedLastServerSeq", value, _NUMBER) for value in ("-1", "1E2", '""', str(2**63))]
    + [(name, '""', "not empty") for name in ("actorId", "type")]
    + [("idempotencyKey", '""', "not empty")]
    + [(name, "1", "a string") for name in ("actorId", "type", "hash", "idempotencyKey")]
    + [(name, r'"a\u0000b"', "NUL") for name in ("actorId", "type", "hash", "idempotencyKey")]
    + [(name, json.dumps("é" * 128), "255 bytes") for name in ("actorId", "type", "hash", "idempotencyKey")]
    + [(name, value, "base64") for name in ("signature", "payloadBase64") for value in (
        "1", "{}", '"A"', '"AA"', '"AA==AA=="', r'"AA==\n"', '" AA=="', '"_-8="', '"é"', r'"\u0000"', '"===="',
    )]
    + [("signature", json.dumps("AAAA" * 342), "1024 bytes")]
    + [(name, "1", "not known") for name in ("foo", "", "x" * 5_000, "payload2", "é", "serverSeq")],
)  # fmt: skip
def test_a_bad_field(http: httpx.Client, session_id: int, field: str, value: str, what: str) -> None:
    """It is named, with what would be right, alone and in a batch; nothing is stored."""
    members = {json.dumps("sessionId"): str(session_id), json.dumps(field): value}
    with nothing_stored(http, session_id):
        body = "{" + ",".join(f"{name}:{text}" for name, text in members.items()) + "}"
        problems = refused(post(http, body), 400, "INVALID_REQUEST")
        if field not in ("sessionId", "expectedLastServerSeq"):
            path = f"/api/collab/sessions/{session_id}/events"
            batch = refused(post(http, "[{},{" + json.dumps(field) + ":" + value + "}]", path), 400, "INVALID_REQUEST")
            assert list(batch) == [f"[1].{name}" for name in problems]
            assert all(what in message for message in batch.values())
    assert list(problems) == [field[:100]]
    assert what in problems[field[:100]]


@pytest.mark.parametrize(
    "members", ['"clientSeq":-1,"clientSeq":2', '"actorId":1,"actorId":"ada"', '"type":"","type":null']
)
def test_a_bad_field_before_a_good_one(http: httpx.Client, session_id: int, members: str) -> None:
    """Where a name stands twice and the last value is right, the other one is refused all the same."""
    with nothing_stored(http, session_id):
        answer = post(http, f'{{"sessionId":{session_id},{members}}}')
        assert refused(answer, 400, "INVALID_REQUEST") == {"body": "must not have a field twice"}
        answer = post(http, f"[{{}},{{{members}}}]", f"/api/collab/sessions/{session_id}/events")
        assert refused(answer, 400, "INVALID_REQUEST") == {"[1]": "must not have a field twice"}


@pytest.mark.parametrize("bad", ['"signature":"!"', '"payload":{},"payloadBase64":"AA=="', '"actorId":1'])
def test_bad_fields_of_different_kinds(http: httpx.Client, session_id: int, bad: str) -> None:
    """All are named, also those that only the service would have told of."""
    with nothing_stored(http, session_id):
        other = '"hash":"\\u0000"' if "payload" in bad else '"hash":"\\u0000","payload":[]'
        named = {"hash"} if "payload" in bad else {"hash", "payload"}
        one = refused(post(http, f'{{"sessionId":{session_id},{bad},{other}}}'), 400, "INVALID_REQUEST")
        assert len(one) == 1 + len(named) and named < one.keys()
        answer = post(http, f"[{{{other}}},{{{bad}}}]", f"/api/collab/sessions/{session_id}/events")
        batch = refused(answer, 400, "INVALID_REQUEST")
        assert len(batch) == 1 + len(named) and {f"[0].{name}" for name in named} < batch.keys()


@pytest.mark.parametrize("name", ["session_id", "client_seq", "server_seq"])
def test_names_are_those_of_the_contract(http: httpx.Client, session_id: int, name: str) -> None:
    """Names as protobuf has them are unknown here, and the right ones are told."""
    answer = post(http, json.dumps({"sessionId": session_id, name: 1}))
    assert "sessionId" in refused(answer, 400, "INVALID_REQUEST", sent=name)[name]


@pytest.mark.parametrize(
    "payload",
    ["[]", "1", '"{}"', "true", "[{}]", '{"a":' * 129 + "1" + "}" * 129, '{"a":' + "[" * 128 + "]" * 128 + "}"],
)
def test_a_payload_that_is_no_object(http: httpx.Client, session_id: int, payload: str) -> None:
    """What is JSON but no object, or nested deeper than 128, has a code of its own, alone and in a batch."""
    with nothing_stored(http, session_id):
        answer = post(http, f'{{"sessionId":{session_id},"payload":{payload}}}')
        assert list(refused(answer, 400, "PAYLOAD_NOT_A_JSON_OBJECT")) == ["payload"]
        answer = post(http, f'[{{}},{{"payload":{payload}}}]', f"/api/collab/sessions/{session_id}/events")
        assert list(refused(answer, 400, "PAYLOAD_NOT_A_JSON_OBJECT")) == ["[1].payload"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b" ", b"{", b"}", b"{]", b'{"a"}', b'{"a":}', b'{"a":1,}', b"{'a':1}", b'{"a":1}{}', b'{"a":1} x', b"[1,]",
        b'{"a":01}', b'{"a":+1}', b'{"a":1.}', b'{"a":.5}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":0x1}', b'{"a":tru}',
        b'{"a":"\x00"}', b'{"a":"\n"}', b'{"a":"\t"}', b'{"a":"\\x"}', b'{"a":"\\u12"}', b'{"a":"',
        b'{"a":"\xff"}', b'{"\xc0\x80":1}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xf5\x80\x80\x80"}', b'{"a":"\xe2\x82"}',
        rb'{"a":"\ud800"}', rb'{"a":"\udc00"}', rb'{"a":"\ud83d cut in the middle of an emoji"}', rb'{"\ud800":1}',
        b'{"a":' * _DEEP, b"[" * _DEEP, b'{"a":' + b"[" * _DEEP + b"]" * _DEEP + b"}", b'{"a":1 // no\n}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    ],
)  # fmt: skip
def test_what_is_not_json(http: httpx.Client, session_id: int, text: bytes) -> None:
    """Malformed JSON is 400 wherever it stands: as the body, in a payload, in a batch, and beside other mistakes."""
    path = f"/api/collab/sessions/{session_id}/events"
    with nothing_stored(http, session_id):
        for body, to in (
            (text, "/api/collab/sessions"),
            (text, "/api/collab/events"),
            (text, path),
            (b'{"sessionId":%d,"payload":%b}' % (session_id, text), "/api/collab/events"),
            (b'{"sessionId":0,"foo":%b}' % text, "/api/collab/events"),
            (b'{"sessionId":0,"payload":%b,"foo":1}' % text, "/api/collab/events"),
            (b'[{},{"payload":%b}]' % text, path),
            (b'[{},{"type":1,"payload":%b},{"foo":1}]' % text, path),
        ):
            problems = refused(post(http, body, to), 400, "INVALID_REQUEST")
            assert set(problems) == {"body"}, problems


def test_half_a_surrogate_pair_is_told(http: httpx.Client, session_id: int) -> None:
    """JavaScript writes one when a text is cut in the middle of an emoji; the answer says so."""
    body = rf'{{"sessionId":{session_id},"payload":{{"text":"\ud83d"}}}}'
    assert "surrogate" in refused(post(http, body), 400, "INVALID_REQUEST")["body"]
    whole = post(http, body.replace(r"\ud83d", r"\ud83d\ude00").replace(str(session_id), str(new_session(http)), 1))
    assert r"\ud83d\ude00" in whole.text


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for path in ("sessions", "events") for body in ("[]", "null", "1", '"{}"', "[{}]")]
    + [("batch", body) for body in ("{}", "null", "1", '"[]"', '{"events":[{}]}')],
)
def test_json_of_the_wrong_kind(http: httpx.Client, session_id: int, path: str, body: str) -> None:
    """An object where an array has to be, or the other way round, is said of the body."""
    path = f"sessions/{session_id}/events" if path == "batch" else path
    with nothing_stored(http, session_id):
        assert list(refused(post(http, body, f"/api/collab/{path}"), 400, "INVALID_REQUEST")) == ["body"]


def test_all_bad_fields_at_once(http: httpx.Client, session_id: int) -> None:
    """Of a body, of a query, and of all items of a batch."""
    bad: dict[str, Any] = {
        "actorId": "", "clientSeq": -1, "type": 1, "payload": [], "payloadBase64": "!", "hash": 1, "signature": "!",
        "idempotencyKey": "\0", "foo": 1,
    }  # fmt: skip
    with nothing_stored(http, session_id):
        answer = post(http, json.dumps({"expectedLastServerSeq": -1, **bad}))
        assert set(refused(answer, 400, "INVALID_REQUEST")) == {"sessionId", "expectedLastServerSeq", *bad}
        assert "more" in answer.json()["message"]

        batch = [{}, bad, 1, {"type": ""}, {"sessionId": session_id}]
        answer = post(http, json.dumps(batch), f"/api/collab/sessions/{session_id}/events")
        assert set(refused(answer, 400, "INVALID_REQUEST")) == {
            *(f"[1].{name}" for name in bad), "[2]", "[3].type", "[4].sessionId"
        }  # fmt: skip

        answer = http.get("/api/collab/events?sinceServerSeq=-1&limit=x&types=&foo=1&limit=1")
        assert set(refused(answer, 400, "INVALID_REQUEST")) == {"sessionId", "sinceServerSeq", "limit", "types", "foo"}

        answer = post(http, '{"languageId":0,"ownerId":"","room":1,"id":1}', "/api/collab/sessions")
        assert set(refused(answer, 400, "INVALID_REQUEST")) == {"languageId", "ownerId", "room", "id"}
        too_long = {"ownerId": "x" * 256, "room": "é" * 128}
        answer = post(http, json.dumps(too_long), "/api/collab/sessions")
        assert set(refused(answer, 400, "INVALID_REQUEST")) == set(too_long)


def test_a_great_many_bad_fields(http: httpx.Client, session_id: int) -> None:
    """However many there are, the answer stays small."""
    path = f"/api/collab/sessions/{session_id}/events"
    for answer in (
        post(http, "[" + ",".join(["1"] * 15_000) + "]", path),
        post(http, "{" + ",".join(f'"a{n}":1' for n in range(300_000)) + "}", "/api/collab/sessions"),
        http.get("/api/collab/sessions?" + "&".join(f"a{n}=1" for n in range(500))),
    ):
        assert len(refused(answer, 400, "INVALID_REQUEST")) == 100
        assert "and at least 100 more" in answer.json()["message"]
        assert len(answer.content) < 50_000
    long_names = post(http, json.dumps([{"type": "x" * 256}] * 900), path)
    assert 5 < len(refused(long_names, 400, "INVALID_REQUEST")) <= 100


@pytest.mark.parametrize(
    ("path", "fields"),
    [(f"events?sessionId={value}", {"sessionId"}) for value in (
        "", "0", "-1", "%2B1", "1.0", "1e0", "1_0", "0x1", "%201", "1%20", "1%0A", "%D9%A1", "01", "null", "true",
        str(2**63), "9" * 5_000, "%00", "[]", "1,2",
    )]
    + [(f"events?sessionId=1&{name}={value}", {name}) for name in ("sinceServerSeq", "limit")
       for value in ("", "-1", "null", "1.5", str(2**63))]
    + [(f"events?sessionId=1&types={value}", {"types"}) for value in ("", ",", "a,", "a,,b", "%00", "x" * 256)]
    + [
        ("events", {"sessionId"}),
        ("events?", {"sessionId"}),
        ("events?sessionId", {"sessionId"}),
        ("events?sessionId=1&sessionId=1", {"sessionId"}),
        ("events?sessionId=1&limit=1&limit=2&foo", {"limit", "foo"}),
        ("events?session_id=1", {"session_id", "sessionId"}),
        ("events?sessionid=1", {"sessionid", "sessionId"}),
        ("events?sessionId=1&types=" + ",".join(map(str, range(1_001))), {"types"}),
        ("events?sessionId=1&types=%ff", {"query"}),
        ("events?sessionId=1&%ff=1", {"query"}),
        ("events?sessionId=1&types=%ed%a0%80", {"query"}),
        ("events?sessionId=1&follow=true", {"follow"}),
        ("sessions?languageId=null", {"languageId"}),
        ("sessions?languageId=0&ownerId=", {"languageId", "ownerId"}),
        ("sessions?ownerId=%00", {"ownerId"}),
        ("sessions?ownerId=" + "x" * 256, {"ownerId"}),
        ("sessions?ownerId=%ff", {"query"}),
        ("sessions?pageSize=0", {"pageSize"}),
        ("sessions?pageSize=-1", {"pageSize"}),
        ("sessions?pageSize=2147483648", {"pageSize"}),
        ("sessions?pageSize=1&room=a", {"room"}),
        ("sessions/1?foo=1", {"foo"}),
        ("sessions/0", {"id"}),
        ("sessions/-1", {"id"}),
        ("sessions/x", {"id"}),
        ("sessions/1.0", {"id"}),
        ("sessions/%D9%A1", {"id"}),
        ("sessions/1%0A", {"id"}),
        ("sessions/%00", {"id"}),
        (f"sessions/{2**63}", {"id"}),
        ("sessions/" + "9" * 5_000, {"id"}),
    ],
)  # fmt: skip
def test_a_bad_query_or_path(http: httpx.Client, path: str, fields: set[str]) -> None:
    """Every parameter that is not what it should be is named; given twice, unknown, empty, or not UTF-8, too."""
    request = http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=f"/api/collab/{path}".encode())
    problems = refused(http.send(request), 400, "INVALID_REQUEST", sent="session_id")
    assert set(problems) == fields


def test_bad_queries_of_calls_that_write(http: httpx.Client, session_id: int) -> None:
    """What has no parameters takes none, and a condition that is no number is no reason to write without one."""
    path = f"/api/collab/sessions/{session_id}"
    with nothing_stored(http, session_id):
        for query in ("expectedLastServerSeq=null", "expectedLastServerSeq=", "expectedLastServerSeq=-1"):
            answer = post(http, "[{}]", f"{path}/events?{query}")
            assert list(refused(answer, 400, "INVALID_REQUEST")) == ["expectedLastServerSeq"]
        answer = post(http, "[{}]", f"{path}/events?expectedLastServerSeq=1&expectedLastServerSeq=1")
        assert list(refused(answer, 400, "INVALID_REQUEST")) == ["expectedLastServerSeq"]
        body = json.dumps({"sessionId": session_id})
        for answer in (
            post(http, body, "/api/collab/events?expectedLastServerSeq=1"),
            post(http, "{}", "/api/collab/sessions?expectedLastServerSeq=1"),
            http.delete(path + "?expectedLastServerSeq=1"),
            http.post(path + "/activity?expectedLastServerSeq=1"),
            http.delete("/api/collab/users/nobody?expectedLastServerSeq=1"),
        ):
            assert list(refused(answer, 400, "INVALID_REQUEST")) == ["expectedLastServerSeq"]
        for bad in ("0", "x", str(2**63)):
            assert list(refused(post(http, "[{}]", f"/api/collab/sessions/{bad}/events"), 400, "INVALID_REQUEST"))
        for user in ("", "%00", "x" * 256):
            assert list(refused(http.delete(f"/api/collab/users/{user}"), 400, "INVALID_REQUEST")) == ["userId"]


def test_a_user_id_that_is_not_utf_8(http: httpx.Client) -> None:
    """It is refused, and not taken for the user whose name is made of replacement characters."""
    session_id = new_session(http, ownerId="\ufffd")
    request = http.build_request("DELETE", "/")
    request.url = request.url.copy_with(raw_path=b"/api/collab/users/%ff")
    assert list(refused(http.send(request), 400, "INVALID_REQUEST")) == ["userId"]
    assert session(http, session_id)["ownerId"] == "\ufffd"
    assert answered(http.delete("/api/collab/users/%EF%BF%BD"))["sessionsReleased"] >= 1


@pytest.mark.parametrize("keys", [[b""], [b"\xff"], [b"x" * 256], [b"a", b"a"], [b"a", b"b"]])
def test_a_bad_idempotency_key_header(http: httpx.Client, session_id: int, keys: list[bytes]) -> None:
    """Empty, too long, twice or not UTF-8: nothing is stored."""
    headers = [(b"content-type", b"application/json"), *((b"idempotency-key", key) for key in keys)]
    with nothing_stored(http, session_id):
        for path, body, place in (
            ("/api/collab/events", f'{{"sessionId":{session_id}}}', ""),
            (f"/api/collab/sessions/{session_id}/events", "[{}]", "[0]."),
        ):
            answer = http.post(path, content=body, headers=headers)
            (field,) = refused(answer, 400, "INVALID_REQUEST")
            assert field in ("Idempotency-Key", place + "idempotencyKey")


def test_two_payloads(http: httpx.Client, session_id: int) -> None:
    """A payload is JSON or bytes, and not both."""
    with nothing_stored(http, session_id):
        answer = post(http, json.dumps({"sessionId": session_id, "payload": {}, "payloadBase64": ""}))
        assert list(refused(answer, 400, "INVALID_REQUEST")) == ["payloadBase64"]
        answer = post(http, '[{},{"payload":{},"payloadBase64":"AA=="}]', f"/api/collab/sessions/{session_id}/events")
        assert list(refused(answer, 400, "INVALID_REQUEST")) == ["[1].payloadBase64"]


def test_bad_batches(http: httpx.Client, session_id: int) -> None:
    """An empty one, one with a key twice, and keys that are stored with other content."""
    path = f"/api/collab/sessions/{session_id}/events"
    other = new_session(http)
    append_batch(http, other, [{"idempotencyKey": "a"}, {"idempotencyKey": "b"}])
    with nothing_stored(http, session_id), nothing_stored(http, other):
        assert list(refused(post(http, "[]", path), 400, "INVALID_REQUEST")) == ["body"]
        answer = post(http, '[{"idempotencyKey":"x"},{},{"idempotencyKey":"x"}]', path)
        assert list(refused(answer, 400, "INVALID_REQUEST")) == ["[2].idempotencyKey"]
        answer = post(
            http, '[{"idempotencyKey":"b"},{},{"idempotencyKey":"a"}]', f"/api/collab/sessions/{other}/events"
        )
        reused = refused(answer, 409, "IDEMPOTENCY_KEY_REUSED")
        assert list(reused) == ["[0].idempotencyKey", "[2].idempotencyKey"]


def test_a_page_token_of_another_list(http: httpx.Client) -> None:
    """A token that is none, or was given with other filters, has a code of its own."""
    language = new_session(http)
    for _ in range(2):
        new_session(http, languageId=language)
    first = http.get("/api/collab/sessions", params={"languageId": language, "pageSize": 1})
    token = httpx.URL(first.links["next"]["url"]).params["pageToken"]
    for other in ("pageToken=x", f"pageToken={token}", f"pageToken={token}A&languageId={language}"):
        answer = http.get(f"/api/collab/sessions?{other}")
        assert list(refused(answer, 400, "PAGE_TOKEN_INVALID")) == ["pageToken"]
    second = http.get("/api/collab/sessions", params={"languageId": language, "pageToken": token})
    assert len(answered(second)) == 1


def test_a_number_beyond_the_head(http: httpx.Client, session_id: int) -> None:
    """It is 400, in every form, and for a browser that comes again with such an id."""
    query: dict[str, str | int] = {"sessionId": session_id, "sinceServerSeq": 2}
    for accept in ("application/json", "application/x-ndjson", "text/event-stream"):
        answer = http.get("/api/collab/events", params=query, headers={"accept": accept})
        assert refused(answer, 400, "SERVER_SEQ_BEYOND_HEAD") == {}
        assert "sinceServerSeq is 2" in answer.json()["message"]
    again = {"accept": "text/event-stream", "last-event-id": "3"}
    answer = http.get("/api/collab/events", params={"sessionId": session_id}, headers=again)
    assert refused(answer, 400, "SERVER_SEQ_BEYOND_HEAD") == {}
    assert events(http, session_id, sinceServerSeq=1) == []


@pytest.mark.parametrize("last", ["-1", "x", "1.0", "9" * 5_000, str(2**63), "0x1", "\u0661"])
def test_a_bad_last_event_id(http: httpx.Client, session_id: int, last: str) -> None:
    """It is named as what it is, a header."""
    headers = {b"accept": b"text/event-stream", b"last-event-id": last.encode()}
    answer = http.get("/api/collab/events", params={"sessionId": session_id}, headers=headers)
    assert list(refused(answer, 400, "INVALID_REQUEST")) == ["Last-Event-ID"]


def test_events_that_are_too_large(http: httpx.Client, session_id: int) -> None:
    """A payload over 1 MiB, a batch of more than 1,000 events or over 4 MiB: 413, each with a code of its own."""
    path = f"/api/collab/sessions/{session_id}/events"
    large = json.dumps({"a": "x" * (1024 * 1024 - 8)})
    assert len(large) == 1024 * 1024 + 1
    fits = json.dumps({"a": "x" * (1024 * 1024 - 9)})
    with nothing_stored(http, session_id):
        answer = post(http, f'{{"sessionId":{session_id},"payload":{large}}}')
        assert list(refused(answer, 413, "EVENT_TOO_LARGE")) == ["payload"]
        answer = post(http, f'[{{}},{{"payload":{large}}}]', path)
        assert list(refused(answer, 413, "EVENT_TOO_LARGE")) == ["[1].payload"]
        for body in (
            "[" + ",".join(["{}"] * 1_001) + "]",
            "[" + ",".join([f'{{"payload":{fits}}}'] * 4 + ["{}"]) + "]",
            "[" + ",".join(["{}"] * 2_500_000) + "]",
            "[" + ",".join(["1"] * 4_000_000) + "]",
        ):
            assert list(refused(post(http, body, path), 413, "BATCH_TOO_LARGE")) == ["body"]
    other = new_session(http)
    assert post(http, f'{{"sessionId":{other},"payload":{fits}}}').status_code == 201
    assert append_batch(http, other, [{}] * 1_000)["lastServerSeq"] == 1_001


def test_a_body_that_is_too_large(small_server: ServeProcess, small_http: httpx.Client) -> None:
    """It is 413 before it is looked at, with a length and without; the connection goes on, and so does the client."""
    session_id = new_session(small_http)

    def body(size: int) -> bytes:
        start, end = b'{"sessionId":%d,"payload":{"a":"' % session_id, b'"}}'
        return start + b"x" * (size - len(start) - len(end)) + end

    def in_parts(size: int) -> Iterator[bytes]:
        whole = body(size)
        yield from (whole[at : at + 1_000] for at in range(0, size, 1_000))

    with nothing_stored(small_http, session_id):
        for size in (SMALL_BODY + 1, 100_000, 20_000_000):
            for content in (body(size), in_parts(size)):
                answer = small_http.post("/api/collab/events", content=content, headers=JSON)
                assert refused(answer, 413, "BODY_TOO_LARGE") == {}
                assert str(SMALL_BODY) in answer.json()["message"]
        malformed = small_http.post("/api/collab/events", content=b"\xff" * 100_000, headers=JSON)
        assert refused(malformed, 413, "BODY_TOO_LARGE") == {}
    for content in (body(SMALL_BODY), in_parts(SMALL_BODY)):
        assert small_http.post("/api/collab/events", content=content, headers=JSON).status_code == 201

    # One that sends all it has before it reads anything, as most do.
    connection = http.client.HTTPConnection(small_server.http_address, timeout=TIMEOUT)
    for size, status in ((20_000_000, 413), (100, 201)):
        connection.request("POST", "/api/collab/events", body(size), JSON)
        told = connection.getresponse()
        assert (told.status, bool(told.read())) == (status, True)
    connection.close()


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp",
     "application/json; charset=latin-1", "application/json, text/plain", "application/json-patch+json", "json", "é"],
)  # fmt: skip
def test_a_wrong_content_type(http: httpx.Client, session_id: int, kind: str) -> None:
    """Only JSON in UTF-8 is taken for JSON: without, any page in a browser could write without being asked."""
    headers = {b"content-type": kind.encode()} if kind else {}
    with nothing_stored(http, session_id):
        for path, body in (
            ("/api/collab/events", b'{"sessionId":%d}' % session_id),
            (f"/api/collab/sessions/{session_id}/events", b"[{}]"),
            ("/api/collab/sessions", b"{}"),
        ):
            answer = http.post(path, content=body, headers=headers)
            assert refused(answer, 415, "UNSUPPORTED_MEDIA_TYPE") == {}
            assert "application/json" in answer.json()["message"]


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 201), ("", 201)])
def test_a_body_that_is_encoded(http: httpx.Client, encoding: str, status: int) -> None:
    """Nothing unpacks one here, so it is not taken for what it is not, also when it is none."""
    plain = gzip.compress(b"{}") if status == 415 else b"{}"
    for content in (plain, b"{}"):
        headers = {"content-type": "application/json", **({"content-encoding": encoding} if encoding else {})}
        answer = http.post("/api/collab/sessions", content=content, headers=headers)
        assert answer.status_code == status
        if status == 415:
            assert refused(answer, 415, "UNSUPPORTED_MEDIA_TYPE") == {}
            assert "Content-Encoding" in answer.json()["message"]
            assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/api/collab/sessions", {"GET", "POST"}),
        ("/api/collab/sessions/1", {"GET", "DELETE"}),
        ("/api/collab/sessions/1/activity", {"POST"}),
        ("/api/collab/sessions/1/events", {"POST"}),
        ("/api/collab/events", {"GET", "POST"}),
        ("/api/collab/users/ada", {"DELETE"}),
    ],
)
def test_a_wrong_method(http: httpx.Client, path: str, allowed: set[str]) -> None:
    """405, with all methods that are right, in Allow and in words."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} - allowed:
        answer = http.request(method, path, json={})
        assert refused(answer, 405, "METHOD_NOT_ALLOWED") == {}
        assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed
        assert all(name in answer.json()["message"] for name in allowed)
    head = http.head(path)
    assert (head.status_code, head.content) == (405, b"")


@pytest.mark.parametrize(
    "path",
    ["/api", "/api/collab", "/api/collab/", "/api/collab/sessions/", "/api/collab/sessions/1/", "/API/collab/sessions",
     "/api/collab/sessions/1/events/1", "/api/collab/sessions/1/2/3", "/nothing", "/.env", "/a//b", "/%00", "/%ff",
     "/é/語", "/static/nothing", "/static/../app.py", "/static/%2e%2e/app.py", "/" + "x" * 5_000],
)  # fmt: skip
def test_an_unknown_path(http: httpx.Client, path: str) -> None:
    """404 with a code that tells it from a session that is not there, and where to look."""
    for method in ("GET", "POST", "DELETE"):
        answer = http.request(method, path)
        error = answer.json()
        assert (answer.status_code, error["code"], error["details"]) == (404, "ROUTE_NOT_FOUND", [])
        assert "/docs" in error["message"]
        assert len(answer.content) < 1_000


def test_followers_of_what_is_no_session(http: httpx.Client) -> None:
    """What the inspector asks for is checked as well, however many digits it has."""
    for name in ("x", "0", "9" * 5_000):
        answer = http.get(f"/inspector/followers/{name}")
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")


def test_too_many_followers(small_http: httpx.Client) -> None:
    """A browser never comes again after a 429: it is told to, in a stream that ends at once."""
    query, accept = {"sessionId": new_session(small_http)}, {"accept": "text/event-stream"}
    with small_http.stream("GET", "/api/collab/events", params=query, headers=accept) as first:
        parts = first.iter_text()
        assert next(parts).startswith("retry: 2000\n\nevent: caught-up\n")
        second = small_http.get("/api/collab/events", params=query, headers=accept)
        assert (second.status_code, second.text) == (200, "retry: 2000\n\n")


def test_more_appends_than_may_wait(small_database_url: str, small_http: httpx.Client) -> None:
    """429 with when to come again; nothing of what was refused is stored, everything else is."""
    session_id = new_session(small_http)
    with psycopg.connect(small_database_url) as connection, ThreadPoolExecutor(8) as threads:
        connection.execute("SELECT 1 FROM collab_sessions WHERE id = %s FOR UPDATE", (session_id,))
        body = {"sessionId": session_id}
        calls = [threads.submit(small_http.post, "/api/collab/events", json=body) for _ in range(8)]
        while not any(call.done() for call in calls):  # as many as can are waiting for the lock
            small_http.get("/healthz")
        connection.rollback()
        answers = [call.result() for call in calls]
    stored = [answer for answer in answers if answer.status_code == 201]
    overloaded = [answer for answer in answers if answer.status_code != 201]
    assert overloaded
    for answer in overloaded:
        refused(answer, 429, "OVERLOADED")
        assert int(answer.headers["retry-after"]) >= 1
    assert len(events(small_http, session_id)) == len(stored)


def test_a_fault_of_the_service(small_server: ServeProcess, small_database_url: str, small_http: httpx.Client) -> None:
    """500 with a fixed text and an id that stands in the service's log, beside what really happened."""
    session_id = new_session(small_http)
    rename = "ALTER TABLE collab_sessions RENAME COLUMN {} TO {}"
    with psycopg.connect(small_database_url, autocommit=True) as connection:
        connection.execute(rename.format("language_id", "gone"))
        try:
            answer = small_http.get(f"/api/collab/sessions/{session_id}")
        finally:
            connection.execute(rename.format("gone", "language_id"))
    request_id = answer.headers["x-request-id"]
    assert (answer.status_code, answer.json()) == (
        500,
        {
            "error": "internal",
            "message": f"internal error; the server's log says more about {request_id}",
            "code": "INTERNAL",
            "details": [],
        },
    )
    assert "gone" not in answer.text
    small_server.wait_for("call failed", request_id=request_id, reason="INTERNAL")
    small_server.wait_for("request failed", request_id=request_id, code="INTERNAL", status=500)
    assert session(small_http, session_id)["id"] == session_id


_STATUSES = {
    "INVALID_REQUEST": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "PAYLOAD_NOT_A_JSON_OBJECT": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "PAGE_TOKEN_INVALID": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "EVENT_TOO_LARGE": (grpc.StatusCode.INVALID_ARGUMENT, 413),
    "BATCH_TOO_LARGE": (grpc.StatusCode.INVALID_ARGUMENT, 413),
    "IDEMPOTENCY_KEY_REUSED": (grpc.StatusCode.INVALID_ARGUMENT, 409),
    "SESSION_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, 404),
    "SERVER_SEQ_CONFLICT": (grpc.StatusCode.ABORTED, 409),
    "SERVER_SEQ_BEYOND_HEAD": (grpc.StatusCode.OUT_OF_RANGE, 400),
    "SERVER_SEQ_COMPACTED": (grpc.StatusCode.OUT_OF_RANGE, 410),
    "OVERLOADED": (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    "TOO_MANY_FOLLOWERS": (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    "STORAGE_UNAVAILABLE": (grpc.StatusCode.UNAVAILABLE, 503),
    "SHUTTING_DOWN": (grpc.StatusCode.UNAVAILABLE, 503),
    "COMMIT_OUTCOME_UNKNOWN": (grpc.StatusCode.UNAVAILABLE, 503),
    "INTERNAL": (grpc.StatusCode.INTERNAL, 500),
}
_TRANSPORT = [
    # What grpc itself says has no reason, and is about addresses: (its status, its words, status and code when reading,
    # status and code when writing)
    (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: ipv4:127.0.0.1:50051: refused",
     (503, "STORAGE_UNAVAILABLE"), (503, "STORAGE_UNAVAILABLE")),
    (grpc.StatusCode.UNAVAILABLE, "recvmsg:Connection reset by peer ipv4:127.0.0.1:50051",
     (503, "STORAGE_UNAVAILABLE"), (503, "COMMIT_OUTCOME_UNKNOWN")),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded on 127.0.0.1:50051",
     (503, "STORAGE_UNAVAILABLE"), (503, "COMMIT_OUTCOME_UNKNOWN")),
    (grpc.StatusCode.INTERNAL, "psycopg.Error in /home/collab_service/x.py", (500, "INTERNAL"),
     (503, "COMMIT_OUTCOME_UNKNOWN")),
    (grpc.StatusCode.UNKNOWN, "Traceback (most recent call last)", (500, "INTERNAL"), (503, "COMMIT_OUTCOME_UNKNOWN")),
    (grpc.StatusCode.UNIMPLEMENTED, "grpc: no such method", (500, "INTERNAL"), (500, "INTERNAL")),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 8)",
     (413, "BATCH_TOO_LARGE"), (413, "BATCH_TOO_LARGE")),
]  # fmt: skip


async def test_every_reason_has_its_status(directory: Path) -> None:
    """The whole table of the contract, and what the transport itself says; a 429 or 503 says when to come again."""
    answers = [Refusal(code, reason, f"no {reason}") for reason, (code, _) in _STATUSES.items()]
    expected = [(status, reason) for reason, (_, status) in _STATUSES.items()]
    both = [(Refusal(code, message=words), reading, writing) for code, words, reading, writing in _TRANSPORT]
    answers += [refusal for refusal, _, _ in both for _ in range(2)]
    async with AnsweringService(*answers) as service:
        with GatewayProcess(service.address, cwd=directory) as gateway:
            url = f"http://{gateway.http_address}"
            async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as http:
                for status, code in expected:
                    answer = await http.get("/api/collab/sessions/1")
                    refused(answer, status, code)
                    assert answer.json()["message"] == f"no {code}"
                    assert ("retry-after" in answer.headers) == (status in (429, 503))
                for _, reading, writing in both:
                    refused(await http.get("/api/collab/sessions/1"), *reading)
                    refused(await http.post("/api/collab/events", json={"sessionId": 1}), *writing)
            gateway.process.kill()
            gateway.wait()
    assert service.calls == len(answers)
