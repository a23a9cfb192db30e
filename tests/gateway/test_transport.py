"""What HTTP brings along: packing, kept connections, other origins' pages, and a name for every request."""

import contextlib
import gzip
import json
import re
import time
from pathlib import Path

import httpx
import pytest

from tests.gateway.calls import JSON, TIMEOUT, append, append_batch, new_session, refused
from tests.gateway.conftest import ORIGIN
from tests.gateway.wire import connected, request_bytes
from tests.processes import GatewayProcess, ServeProcess

_OTHER_ORIGIN = "https://elsewhere.example"


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip", True), ("gzip, deflate, br", True), ("br;q=1.0, gzip;q=0.8, *;q=0.1", True), ("gzip;q=1", True),
        ("gzip;q=0.001", True), ("", False), ("identity", False), ("br", False), ("*", False), ("gzip;q=0", False),
        ("gzip; q=0.0", False), ("br, gzip ;q=0.000, identity", False),
    ],
)  # fmt: skip
def test_packed_where_asked_for(http: httpx.Client, accepted: str, packed: bool) -> None:
    """Answers are packed for those who say that they understand it, and for nobody else; the content is the same."""
    session_id = new_session(http)
    append_batch(http, session_id, [{"payload": {"text": "x" * 100}}] * 100)
    plain = {"accept-encoding": "identity"}
    for path in (f"/api/collab/events?sessionId={session_id}", "/openapi.json"):
        for accept in ("application/json", "application/x-ndjson"):
            headers = {"accept-encoding": accepted, "accept": accept}
            with http.stream("GET", path, headers=headers) as answer:
                content = b"".join(answer.iter_raw())
            assert ("content-encoding" in answer.headers) == packed
            if packed:
                assert answer.headers["content-encoding"] == "gzip"
                assert "accept-encoding" in answer.headers["vary"].lower()
                content = gzip.decompress(content)
            assert content == http.get(path, headers=plain | {"accept": accept}).content


@pytest.mark.parametrize(
    ("accepted", "kind"),
    [
        ("*/*", "application/json"), ("text/html, */*;q=0.8", "application/json"),
        ("application/x-ndjson", "application/x-ndjson"), ("Application/X-NDJSON; q=0.5", "application/x-ndjson"),
        ("text/event-stream", "text/event-stream"), ("text/event-stream, */*;q=0.1", "text/event-stream"),
        ("application/json;q=1, text/event-stream;q=0", "application/json"),
        ("text/event-stream;q=0.5, application/json", "application/json"),
        ("application/json;q=0.2, application/x-ndjson;q=0.3", "application/x-ndjson"),
        ("application/x-ndjson;q=0", "application/json"),
    ],
)  # fmt: skip
def test_the_kind_of_list_that_is_asked_for(http: httpx.Client, accepted: str, kind: str) -> None:
    """What is preferred is what comes, and what is refused never does (RFC 9110, 12.5.1)."""
    session_id = append(http, new_session(http))["sessionId"]
    parameters = {"sessionId": session_id, "limit": 1}  # with which also a follow ends
    answer = http.get("/api/collab/events", params=parameters, headers={"accept": accepted})
    assert answer.headers["content-type"].partition(";")[0] == kind


def test_small_answers_are_not_packed(http: httpx.Client) -> None:
    """What is a few hundred bytes would only grow."""
    answer = http.get(f"/api/collab/sessions/{new_session(http)}", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_connections_are_kept(server: ServeProcess, gateway: GatewayProcess) -> None:
    """One connection serves any number of calls, errors and lists among them, also when they are sent all at once."""
    for address in (server.http_address, gateway.http_address):
        async with connected(address) as connection:
            created = await connection.ask(
                request_bytes("/api/collab/sessions", method="POST", headers=JSON, body=b"{}")
            )
            session_id = json.loads(await created.body())["id"]
            paths = {
                f"/api/collab/sessions/{session_id}": 200,
                "/api/collab/sessions/0": 400,
                f"/api/collab/events?sessionId={session_id}": 200,
                "/nothing": 404,
                "/healthz": 200,
                "/readyz": 200,
            }
            for path, status in paths.items():
                answer = await connection.ask(request_bytes(path))
                assert (answer.status, bool(await answer.body())) == (status, True)
            wrong = await connection.ask(request_bytes("/api/collab/events", method="POST", body=b"{}"))
            assert (wrong.status, bool(await wrong.body())) == (415, True)
            connection.writer.write(b"".join(map(request_bytes, paths)))
            for status in paths.values():
                answer = await connection.ask(b"")
                assert (answer.status, bool(await answer.body())) == (status, True)
            deleted = await connection.ask(request_bytes(f"/api/collab/sessions/{session_id}", method="DELETE"))
            assert (deleted.status, "content-length" in deleted.headers) == (204, False)
            last = await connection.ask(request_bytes("/healthz", headers={"connection": "close"}))
            assert (last.status, await last.body()) == (200, b'{"status":"ok"}')
            assert await connection.is_closed()


async def test_a_request_without_a_host(server: ServeProcess) -> None:
    """Whatever a client says the host is, the answer is the same: nothing is made of it."""
    for host in ("", "[", "a@b", "x/y?z#", "x y", "\u00e9"):
        async with connected(server.http_address) as connection:
            request = f"GET /api/collab/sessions?pageSize=1 HTTP/1.1\r\nhost: {host}\r\n\r\n".encode("latin-1")
            answer = await connection.ask(request)
            assert (answer.status, len(json.loads(await answer.body()))) == (200, 1)
            assert answer.headers.get("link", "</api").startswith("</api")
            missing = await connection.ask(f"GET /nothing HTTP/1.1\r\nhost: {host}\r\n\r\n".encode("latin-1"))
            assert (missing.status, json.loads(await missing.body())["code"]) == (404, "ROUTE_NOT_FOUND")


def test_other_origins_are_not_let_in(http: httpx.Client) -> None:
    """Nothing about CORS is said unless configured, so that no page of somebody else's can read or write."""
    session_id = new_session(http)
    for answer in (
        http.get(f"/api/collab/sessions/{session_id}", headers={"origin": _OTHER_ORIGIN}),
        http.post("/api/collab/sessions", json={}, headers={"origin": _OTHER_ORIGIN}),
    ):
        assert answer.is_success
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    preflight = http.options(
        "/api/collab/events",
        headers={"origin": _OTHER_ORIGIN, "access-control-request-method": "POST"},
    )
    refused(preflight, 405, "METHOD_NOT_ALLOWED")
    assert not [name for name in preflight.headers if name.startswith("access-control-")]


def test_an_origin_that_is_let_in(small_http: httpx.Client) -> None:
    """Its pages may do everything there is to do, read what answers say beside the body, and see errors."""
    session_id = new_session(small_http)
    for answer in (
        small_http.get(f"/api/collab/sessions/{session_id}", headers={"origin": ORIGIN}),
        small_http.get("/api/collab/events", params={"sessionId": session_id}, headers={"origin": ORIGIN}),
        small_http.post("/api/collab/events", content=b"", headers={"origin": ORIGIN}),
        small_http.get("/nothing", headers={"origin": ORIGIN}),
    ):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "origin" in answer.headers["vary"].lower()
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert exposed >= {"link", "retry-after", "x-request-id"}
    for method in ("GET", "POST", "DELETE"):
        preflight = small_http.options(
            "/api/collab/events",
            headers={
                "origin": ORIGIN,
                "access-control-request-method": method,
                "access-control-request-headers": "content-type, idempotency-key, last-event-id, x-request-id",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert method in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["x-request-id"]
    other = {"origin": _OTHER_ORIGIN, "access-control-request-method": "POST"}
    assert small_http.options("/api/collab/events", headers=other).status_code == 400
    for headers in (other, {"origin": "null"}, {"origin": ORIGIN + ".evil.example"}):
        answer = small_http.get(f"/api/collab/sessions/{session_id}", headers={"origin": headers["origin"]})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("name", ["a", "req-1/2:3", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~", "x" * 128])
def test_a_request_keeps_its_name(server: ServeProcess, gateway: GatewayProcess, http: httpx.Client, name: str) -> None:
    """The caller's own request id stands in the answer, in the gateway's log and in the service's."""
    with httpx.Client(base_url=f"http://{gateway.http_address}", timeout=TIMEOUT, trust_env=False) as other:
        for client, process in ((http, server), (other, gateway)):
            answer = client.get("/api/collab/sessions/999999999999", headers={"x-request-id": name})
            refused(answer, 404, "SESSION_NOT_FOUND")
            assert answer.headers["x-request-id"] == name
            line = process.wait_for("request failed", request_id=name)
            assert line["status"] == 404
            assert (line["code"], line["method"]) == ("SESSION_NOT_FOUND", "GET")
            assert line["path"] == "/api/collab/sessions/999999999999"
            server.wait_for("call failed", request_id=name, method="GetSession", reason="SESSION_NOT_FOUND")


def test_requests_that_fail_by_the_thousand(database_url: str, directory: Path) -> None:
    """They do not flood the log: 100 lines a second tell of them, and say how many there were."""
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as server,  # whose lines nobody else waits for
        httpx.Client(base_url=f"http://{server.http_address}", timeout=TIMEOUT, trust_env=False) as http,
    ):

        def lines() -> list[int]:
            return [line["requests"] for line in server.lines if line.get("event") == "request failed"]

        started = time.monotonic()
        for _ in range(1_000):
            refused(http.get("/api/collab/sessions/0"), 400, "INVALID_REQUEST")
        while sum(lines()) < 1_000:
            refused(http.get("/api/collab/sessions/0"), 400, "INVALID_REQUEST")
            assert time.monotonic() - started < TIMEOUT
        assert len(lines()) <= 100 * (time.monotonic() - started + 2)


@pytest.mark.parametrize("name", [b"", b"a b", b"x" * 129, "é".encode(), b"a\tb"])
def test_a_request_is_given_a_name(server: ServeProcess, http: httpx.Client, name: bytes) -> None:
    """One that has no fitting id is given one, which stands in the same places."""
    answer = http.get("/api/collab/sessions/999999999999", headers={b"x-request-id": name})
    given = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    server.wait_for("request failed", request_id=given)
    server.wait_for("call failed", request_id=given)


def test_every_answer_has_a_name(http: httpx.Client) -> None:
    """Also lists, streams, pages, what has no body, and what is refused; each has another one."""
    session_id = new_session(http)
    events = f"/api/collab/events?sessionId={session_id}"
    answers = [
        http.get(events),
        http.get(events, headers={"accept": "application/x-ndjson"}),
        http.get(events + "&types=a&limit=1"),
        http.get("/"),
        http.get("/docs"),
        http.get("/openapi.json"),
        http.get("/healthz"),
        http.head("/healthz"),
        http.get("/readyz"),
        http.get("/nothing"),
        http.put(events),
        http.post("/api/collab/events"),
        http.post("/api/collab/events", content=b"{", headers=JSON),
        http.delete(f"/api/collab/sessions/{session_id}"),
        http.get("/"),
    ]
    names = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(names)) == len(names)
    assert all(len(answer.headers.get_list("x-request-id")) == 1 for answer in answers)
    assert not [answer for answer in answers if "server" in answer.headers]


def test_a_path_in_the_log_is_as_it_was_sent(server: ServeProcess, http: httpx.Client) -> None:
    """Nobody writes lines of their own, or escape sequences, into the log."""
    answer = http.get("/nothing%0Ahere%1b[2J?secret=1")
    line = server.wait_for("request failed", request_id=answer.headers["x-request-id"])
    assert line["path"].lower() == "/nothing%0ahere%1b[2j"
    assert "secret" not in json.dumps(line)


_NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"nonsense\r\n\r\n", b"GET\r\n\r\n",
    b"FOO / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\n\r\n", b"GET http://x HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nx: a\0b\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /api/collab/events HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
]  # fmt: skip


@pytest.mark.parametrize("sent", _NO_HTTP, ids=range(len(_NO_HTTP)))
async def test_what_is_no_http(server: ServeProcess, sent: bytes) -> None:
    """It is 400 in the shape of every other error, with a name that stands in the log, and the connection ends."""
    async with connected(server.http_address) as connection:
        answer = await connection.ask(sent)
        error = json.loads(await answer.body())
        assert (answer.status, error["code"], error["details"]) == (400, "INVALID_REQUEST", [])
        assert await connection.is_closed()
    server.wait_for("request failed", request_id=answer.headers["x-request-id"], code="INVALID_REQUEST")


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b"GET /", b" HTTP/1.1\r\n\r\n"),
        (b"GET / HTTP/1.1\r\nx: ", b"\r\n\r\n"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5_000 + b"x: ", b"\r\n\r\n"),
    ],
    ids=["path", "header", "headers"],
)
async def test_a_head_that_does_not_end(server: ServeProcess, start: bytes, end: bytes) -> None:
    """It is not kept: beyond 64 KiB the answer is 431, also on a connection that has served, which then ends."""
    async with connected(server.http_address) as connection:
        served = await connection.ask(start + b"x" * (60_000 - len(start)) + end)
        assert served.status in (200, 404)
        await served.body()
        answer = await connection.ask(start + b"x" * (64 * 1024 + 1 - len(start)))
        assert (answer.status, json.loads(await answer.body())["code"]) == (431, "HEADERS_TOO_LARGE")
        assert await connection.is_closed()


async def test_trailers_that_do_not_end(server: ServeProcess) -> None:
    """What comes behind a body is not kept either."""
    request = request_bytes("/api/collab/sessions", method="POST", headers=JSON | {"transfer-encoding": "chunked"})
    async with connected(server.http_address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.writer.write(request + b"2\r\n{}\r\n0\r\nx: ")
            for _ in range(1_000):
                connection.writer.write(b"y" * 10_000)
                await connection.writer.drain()
            pytest.fail("10 MB were taken")
