"""Every call of the contract's HTTP half: exact shapes, statuses and headers."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.gateway.calls import (
    EVENT_KEYS,
    JSON,
    SESSION_KEYS,
    TIME,
    TIMEOUT,
    answered,
    append,
    append_batch,
    events,
    new_session,
    refused,
    session,
)
from tests.processes import GatewayProcess
from tests.rpc.calls import events as stored_events

_FULL_EVENT = {
    "actorId": "ada/é/語",
    "clientSeq": 0,
    "type": "insert",
    "payload": {"text": "héllo \U0001f600", "at": 1.0},
    "hash": "sha256:abc",
    "signature": base64.b64encode(b"\0\xff sig").decode(),
    "idempotencyKey": "k-1",
}


def test_a_new_session(http: httpx.Client, stub: CollabServiceStub) -> None:
    """201 with the session, absent values as null, times with six decimals; the same that gRPC returns."""
    created = answered(http.post("/api/collab/sessions", json={}), 201)
    assert list(created) == SESSION_KEYS
    assert {name for name, value in created.items() if value is None} == {"languageId", "ownerId", "room"}
    assert TIME.fullmatch(created["createdAt"])
    assert created["createdAt"] == created["lastActive"]
    assert created["lastServerSeq"] == 0
    there = stub.GetSession(pb.GetSessionRequest(session_id=created["id"]), timeout=TIMEOUT).session
    assert there.create_time.ToDatetime().isoformat(timespec="microseconds") + "Z" == created["createdAt"]
    full = {"languageId": 2**63 - 1, "ownerId": "Zoë 語", "room": f"room {created['id']}"}
    assert answered(http.post("/api/collab/sessions", json=full), 201).items() >= full.items()


def test_a_room_that_exists(http: httpx.Client) -> None:
    """200 with the session that has the room, nothing changed, whatever else is asked for."""
    room = f"room of {new_session(http)}"
    first = answered(http.post("/api/collab/sessions", json={"room": room, "languageId": 1, "ownerId": "ada"}), 201)
    again = http.post("/api/collab/sessions", json={"room": room, "languageId": 2, "ownerId": "bob"})
    assert answered(again, 200) == first
    assert session(http, first["id"]) == first


def test_a_session_is_shown_touched_and_deleted(http: httpx.Client) -> None:
    """200 with the session; activity moves to now; 204 with nothing, and from then on 404, its room free."""
    created = answered(http.post("/api/collab/sessions", json={"room": f"R{new_session(http)}"}), 201)
    path = f"/api/collab/sessions/{created['id']}"
    assert answered(http.get(path)) == created
    touched = answered(http.post(path + "/activity"))
    assert touched == created | {"lastActive": touched["lastActive"]}
    assert TIME.fullmatch(touched["lastActive"])
    assert touched["lastActive"] > created["lastActive"]
    append(http, created["id"])

    deleted = http.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert "content-type" not in deleted.headers
    assert deleted.headers["x-request-id"]
    for gone in (
        http.get(path),
        http.delete(path),
        http.post(path + "/activity"),
        http.post("/api/collab/events", json={"sessionId": created["id"]}),
        http.post(path + "/events", json=[{}]),
        http.get("/api/collab/events", params={"sessionId": created["id"]}),
        http.get("/api/collab/events", params={"sessionId": created["id"]}, headers={"accept": "application/x-ndjson"}),
        http.get("/api/collab/events", params={"sessionId": created["id"]}, headers={"accept": "text/event-stream"}),
    ):
        assert refused(gone, 404, "SESSION_NOT_FOUND") == {}
    assert answered(http.post("/api/collab/sessions", json={"room": created["room"]}), 201)["id"] != created["id"]


@pytest.mark.parametrize(
    "user", ["ada", "a/b//c/", "Zoë 語 \U0001f600", "50%2Foff", "b\n", "\n", "?a=b&c#d+e", " ", ".."]
)
def test_a_user_is_removed(http: httpx.Client, user: str) -> None:
    """Whatever the id is made of, sessions of this user, and of no other, have no owner; the second time it is none."""
    owner = f"{new_session(http)} {user}"
    owned = [new_session(http, ownerId=owner) for _ in range(2)]
    others = {new_session(http, ownerId=other): other for other in {owner.strip(), owner + "/"} - {owner}}
    event = append(http, owned[0], actorId=owner)
    assert answered(http.delete("/api/collab/users/" + quote(owner, safe="/"))) == {"sessionsReleased": 2}
    assert answered(http.delete("/api/collab/users/" + quote(owner, safe=""))) == {"sessionsReleased": 0}
    assert [session(http, session_id)["ownerId"] for session_id in owned] == [None, None]
    assert {session_id: session(http, session_id)["ownerId"] for session_id in others} == others
    assert events(http, owned[0]) == [event]


def test_an_event(http: httpx.Client, stub: CollabServiceStub) -> None:
    """201 with the event as it is stored, absent values as null; it is the one that gRPC and a list return."""
    session_id = new_session(http)
    bare = append(http, session_id)
    full = append(http, session_id, **_FULL_EVENT)
    for event, number in ((bare, 1), (full, 2)):
        assert list(event) == EVENT_KEYS
        assert (event["sessionId"], event["serverSeq"]) == (session_id, number)
        assert TIME.fullmatch(event["createdAt"])
    absent = {name for name, value in bare.items() if value is None}
    assert absent == {"actorId", "clientSeq", "type", "hash", "signature", "idempotencyKey"}
    assert bare["payload"] == {}
    assert full.items() >= _FULL_EVENT.items()
    assert events(http, session_id) == [bare, full]
    stored = stored_events(stub, session_id)
    assert [event.chain_hash.hex() for event in stored] == [bare["chainHash"], full["chainHash"]]
    assert [event.id for event in stored] == [bare["id"], full["id"]]
    assert session(http, session_id)["lastServerSeq"] == 2


@pytest.mark.parametrize("payload", [b"", b"\0\1\xff", bytes(range(256)) * 4])
def test_a_binary_event(http: httpx.Client, stub: CollabServiceStub, payload: bytes) -> None:
    """Bytes come and go in base64, with null for the payload; also when there are none."""
    session_id, encoded = new_session(http), base64.b64encode(payload).decode()
    event = append(http, session_id, payloadBase64=encoded)
    assert list(event) == [*EVENT_KEYS, "payloadBase64"]
    assert (event["payload"], event["payloadBase64"]) == (None, encoded)
    assert events(http, session_id) == [event]
    (stored,) = stored_events(stub, session_id)
    assert stored.WhichOneof("payload") == "binary"
    assert stored.binary == payload


def test_null_counts_as_absent(http: httpx.Client) -> None:
    """An explicit null is as good as nothing, in every field that may be absent; so a replay is one with it as well."""
    nothing = dict.fromkeys(["languageId", "ownerId", "room"])
    session_id = answered(http.post("/api/collab/sessions", json=nothing), 201)["id"]
    names = ["actorId", "clientSeq", "type", "payload", "payloadBase64", "hash", "signature"]
    absent = dict.fromkeys(names)
    event = append(http, session_id, **absent, idempotencyKey="k", expectedLastServerSeq=None)
    assert event["payload"] == {}
    again = http.post("/api/collab/events", json={"sessionId": session_id, "idempotencyKey": "k"})
    assert answered(again, 200) == event
    binary = append(http, session_id, payload=None, payloadBase64="AA==", idempotencyKey=None)
    assert (binary["payload"], binary["payloadBase64"]) == (None, "AA==")
    assert append_batch(http, session_id, [{**absent, "idempotencyKey": None}])["lastServerSeq"] == 3


def test_an_event_sent_again(http: httpx.Client) -> None:
    """With the key, in the body or as a header, the same event again is 200 with the original, before any condition."""
    session_id = new_session(http)
    body = {"sessionId": session_id, "payload": {"a": 1}, "expectedLastServerSeq": 0}
    first = http.post("/api/collab/events", json=body | {"idempotencyKey": "k é"})
    event = answered(first, 201)
    assert event["idempotencyKey"] == "k é"
    header = {b"idempotency-key": "k é".encode()}
    for again in (
        http.post("/api/collab/events", json=body | {"idempotencyKey": "k é"}),
        http.post("/api/collab/events", json=body, headers=header),
        http.post("/api/collab/events", json=body | {"idempotencyKey": "k é"}, headers=header),
        http.post("/api/collab/events", json=body | {"idempotencyKey": None}, headers=header),
    ):
        assert answered(again, 200) == event
    other = http.post("/api/collab/events", json=body | {"payload": {"a": 2}}, headers=header)
    assert list(refused(other, 409, "IDEMPOTENCY_KEY_REUSED")) == ["idempotencyKey"]
    both = http.post("/api/collab/events", json=body | {"idempotencyKey": "another"}, headers=header)
    assert list(refused(both, 400, "INVALID_REQUEST")) == ["idempotencyKey"]
    assert events(http, session_id) == [event]


def test_a_batch(http: httpx.Client) -> None:
    """201 with where it is: neighbours, all at one time; 200 when it was stored before."""
    session_id = new_session(http)
    append(http, session_id)
    batch = [{**_FULL_EVENT, "clientSeq": number, "idempotencyKey": f"k-{number}"} for number in range(3)]
    batch.append({"payloadBase64": "AAH/"})
    path = f"/api/collab/sessions/{session_id}/events"
    stored = http.post(path, json=batch)
    where = answered(stored, 201)
    assert list(where) == ["firstServerSeq", "lastServerSeq", "createdAt"]
    assert (where["firstServerSeq"], where["lastServerSeq"]) == (2, 5)
    assert TIME.fullmatch(where["createdAt"])
    assert answered(http.post(path, json=batch), 200) == where
    listed = events(http, session_id)[1:]
    assert [event["serverSeq"] for event in listed] == [2, 3, 4, 5]
    assert {event["createdAt"] for event in listed} == {where["createdAt"]}
    assert all(event.items() >= sent.items() for event, sent in zip(listed, batch, strict=True))


def test_the_key_of_a_batch(http: httpx.Client) -> None:
    """As a header it is the key of the first event, which makes the whole batch safe to send again."""
    session_id = new_session(http)
    path, header = f"/api/collab/sessions/{session_id}/events", {"idempotency-key": "b-1"}
    batch = [{"type": "a"}, {"type": "b", "idempotencyKey": "own"}, {}]
    where = answered(http.post(path, json=batch, headers=header), 201)
    assert answered(http.post(path, json=batch, headers=header), 200) == where
    given = [{"type": "a", "idempotencyKey": "b-1"}, *batch[1:]]
    assert answered(http.post(path, json=given, headers=header), 200) == where
    assert [event["idempotencyKey"] for event in events(http, session_id)] == ["b-1", "own", None]
    shorter = http.post(path, json=[{"type": "a"}], headers=header)
    assert answered(shorter, 200)["lastServerSeq"] == 1
    other = http.post(path, json=[{"type": "a"}, {"type": "x"}], headers=header)
    assert "[0].idempotencyKey" in refused(other, 409, "IDEMPOTENCY_KEY_REUSED")
    differs = http.post(path, json=[{"idempotencyKey": "c"}], headers=header)
    assert list(refused(differs, 400, "INVALID_REQUEST")) == ["[0].idempotencyKey"]


def test_conditions(http: httpx.Client) -> None:
    """An append that expects another last number is 409, and says which number it is; nothing is stored."""
    session_id = new_session(http)
    body, path = {"sessionId": session_id, "expectedLastServerSeq": 0}, f"/api/collab/sessions/{session_id}/events"
    assert answered(http.post("/api/collab/events", json=body), 201)["serverSeq"] == 1
    late = http.post("/api/collab/events", json=body)
    assert refused(late, 409, "SERVER_SEQ_CONFLICT") == {}
    assert "expectedLastServerSeq is 0" in late.json()["message"]
    assert "last number is 1" in late.json()["message"]
    assert answered(http.post(path, params={"expectedLastServerSeq": 1}, json=[{}, {}]), 201)["lastServerSeq"] == 3
    assert refused(http.post(path, params={"expectedLastServerSeq": 1}, json=[{}]), 409, "SERVER_SEQ_CONFLICT") == {}
    assert session(http, session_id)["lastServerSeq"] == 3


def test_a_list_of_events(http: httpx.Client) -> None:
    """From after a number, so many, of these types; empty when there is none, in all forms."""
    session_id = new_session(http)
    assert events(http, session_id) == []
    append_batch(http, session_id, [{"type": kind, "payload": {"n": n}} for n, kind in enumerate(["a", "b", "ü", "a"])])

    def numbers(**query: Any) -> list[int]:
        lines = http.get(
            "/api/collab/events", params={"sessionId": session_id, **query}, headers={"accept": "application/x-ndjson"}
        )
        assert (lines.status_code, lines.headers["content-type"]) == (200, "application/x-ndjson")
        assert lines.headers["cache-control"] == "no-store"
        assert "accept" in lines.headers["vary"].lower()
        listed = [json.loads(line) for line in lines.text.splitlines()]
        assert lines.text.count("\n") == len(listed)
        assert listed == events(http, session_id, **query)
        assert all(list(event) == EVENT_KEYS for event in listed)
        return [event["serverSeq"] for event in listed]

    assert numbers() == numbers(sinceServerSeq=0) == numbers(limit=0) == [1, 2, 3, 4]
    assert numbers(sinceServerSeq=2) == [3, 4]
    assert numbers(limit=3) == [1, 2, 3]
    assert numbers(sinceServerSeq=1, limit=1) == [2]
    assert numbers(sinceServerSeq=4) == []
    assert numbers(types="a") == [1, 4]
    assert numbers(types="ü,b") == [2, 3]
    assert numbers(types="a,b", sinceServerSeq=1, limit=1) == [2]
    assert numbers(types="none") == []


def test_all_sessions_and_pages_of_them(http: httpx.Client) -> None:
    """Without a page size all of them come, in order; with one, following Link to its end gives the same, in pages."""
    language, owner = new_session(http), "Zoë & Søn"
    made = [new_session(http, languageId=language, ownerId=owner) for _ in range(5)]
    new_session(http, languageId=language)
    append(http, made[1])
    query: dict[str, str | int] = {"languageId": language, "ownerId": owner}
    everything = answered(http.get("/api/collab/sessions", params=query))
    assert [shown["id"] for shown in everything] == [made[1], *reversed(made[2:]), made[0]]
    assert all(list(shown) == SESSION_KEYS for shown in everything)
    assert len(answered(http.get("/api/collab/sessions", params={"languageId": language}))) == 6
    assert answered(http.get("/api/collab/sessions", params={"languageId": 2**62 + language})) == []

    pages = []
    answer = http.get("/api/collab/sessions", params=query | {"pageSize": 2})
    pages.append(answered(answer))
    while "next" in answer.links:
        url = answer.links["next"]["url"]
        assert urlsplit(url).path == "/api/collab/sessions"
        assert parse_qs(urlsplit(url).query).items() >= {"ownerId": [owner], "pageSize": ["2"]}.items()
        answer = http.get(url)
        pages.append(answered(answer))
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [shown for page in pages for shown in page] == everything
    assert "link" not in answer.headers
    whole = http.get("/api/collab/sessions", params=query | {"pageSize": 1_000_000})
    assert answered(whole) == everything
    assert "link" not in whole.headers


def test_more_sessions_than_a_page_holds(http: httpx.Client, stub: CollabServiceStub) -> None:
    """All of them come, each once, also when there are more than the service returns at once."""
    language = new_session(http)
    request = pb.CreateSessionRequest(language_id=language)
    with ThreadPoolExecutor(16) as pool:
        create = partial(stub.CreateSession, timeout=TIMEOUT)
        made = {answer.session.id for answer in pool.map(create, [request] * 1_100)}
    listed = [shown["id"] for shown in answered(http.get("/api/collab/sessions", params={"languageId": language}))]
    assert len(listed) == 1_100
    assert set(listed) == made


def test_a_gateway_of_its_own_gives_the_same(http: httpx.Client, gateway: GatewayProcess) -> None:
    """`collab gateway` answers as the gateway inside `collab serve` does, byte for byte."""
    session_id = new_session(http)
    append(http, session_id, **_FULL_EVENT)
    with httpx.Client(base_url=f"http://{gateway.http_address}", timeout=TIMEOUT, trust_env=False) as other:
        for path in (
            f"/api/collab/sessions/{session_id}",
            f"/api/collab/events?sessionId={session_id}",
            f"/api/collab/events?sessionId={session_id}&sinceServerSeq=2",
            "/api/collab/sessions/999999999999",
            "/api/collab/events?sessionId=0&foo=1",
            "/openapi.json",
            "/nothing",
            "/healthz",
            "/readyz",
        ):
            here, there = http.get(path), other.get(path)
            assert (there.status_code, there.content) == (here.status_code, here.content)
        assert append(other, session_id)["serverSeq"] == 2
        assert events(other, session_id) == events(http, session_id)


def test_the_key_of_an_append_can_be_sent_with_any_case(http: httpx.Client) -> None:
    """Content types and header names are what they are in any case, and a charset that is UTF-8 does no harm."""
    session_id = new_session(http)
    body = json.dumps({"sessionId": session_id}).encode()
    for kind in ("Application/JSON", "application/json; charset=UTF-8", 'application/json;charset="utf-8"'):
        answered(http.post("/api/collab/events", content=body, headers=JSON | {"content-type": kind}), 201)
    assert len(events(http, session_id)) == 3
