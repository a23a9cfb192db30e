"""Calling the gateway in the tests, and reading its answers."""

import re
from typing import Any

import httpx

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

TIMEOUT = 30.0
JSON = {"content-type": "application/json"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
"""Times as the contract has them."""

SESSION_KEYS = ["id", "languageId", "ownerId", "room", "createdAt", "lastActive", "lastServerSeq"]
EVENT_KEYS = [
    "id", "sessionId", "actorId", "clientSeq", "serverSeq", "type", "payload", "hash", "signature", "idempotencyKey",
    "createdAt", "chainHash",
]  # fmt: skip
_ERROR_KEYS = ["error", "message", "code", "details"]

_INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|grpc|127\.0\.0\.1|localhost|\[::1\]|ipv[46]:|psycopg|postgres|sqlalchemy|collab_service",
    re.IGNORECASE,
)
"""What is nobody's business."""
_SNAKE_CASE = re.compile(r"\b[a-z]+_[a-z_]+\b")


def open_http(address: str) -> httpx.Client:
    """Return a client of a gateway."""
    return httpx.Client(base_url=f"http://{address}", timeout=TIMEOUT, trust_env=False)


def answered(response: httpx.Response, status: int = 200) -> Any:
    """Return the JSON of an answer that has to have this status, and what every answer of a call has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert len(response.headers.get_list("x-request-id")) == 1
    return response.json()


def refused(response: httpx.Response, status: int, code: str, *, sent: str = "") -> dict[str, str]:
    """Return the bad fields of an answer that has to be this error, with what was said about each.

    Args:
        response: The answer.
        status: Its status.
        code: Its code.
        sent: Names that the caller has made up, and so may come back.
    """
    error = answered(response, status)
    assert list(error) == _ERROR_KEYS, error
    assert (error["code"], error["error"]) == (code, code.lower().replace("_", " "))
    assert error["message"]
    for detail in error["details"]:
        assert list(detail) == ["field", "message"]
        assert detail["message"]
    said = " ".join([error["message"], *(text for detail in error["details"] for text in detail.values())])
    assert not _INTERNALS.search(said), said
    assert set(_SNAKE_CASE.findall(said)) <= {sent}, said
    return {detail["field"]: detail["message"] for detail in error["details"]}


def new_session(http: httpx.Client, **fields: Any) -> int:
    """Create a session and return its id."""
    session_id: int = answered(http.post("/api/collab/sessions", json=fields), 201)["id"]
    return session_id


def session(http: httpx.Client, session_id: int) -> Any:
    """Return a session."""
    return answered(http.get(f"/api/collab/sessions/{session_id}"))


def append(http: httpx.Client, session_id: int, **fields: Any) -> Any:
    """Append an event and return it."""
    return answered(http.post("/api/collab/events", json={"sessionId": session_id, **fields}), 201)


def append_batch(http: httpx.Client, session_id: int, batch: list[dict[str, Any]]) -> Any:
    """Append a batch and return where it is."""
    return answered(http.post(f"/api/collab/sessions/{session_id}/events", json=batch), 201)


def events(http: httpx.Client, session_id: int, **query: Any) -> list[Any]:
    """Return a session's events."""
    listed: list[Any] = answered(http.get("/api/collab/events", params={"sessionId": session_id, **query}))
    return listed


def write(stub: CollabServiceStub, session_id: int, *, count: int, payload: str, at_once: int) -> None:
    """Append many events, past the gateway."""
    batch = [pb.NewEvent(json=payload)] * at_once
    for _ in range(count // at_once):
        stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=batch), timeout=TIMEOUT)
