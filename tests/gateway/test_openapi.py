"""The OpenAPI document: valid, of exactly the contract's calls, and true, as schemathesis finds by trying them all."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from tests.gateway.calls import EVENT_KEYS, SESSION_KEYS, TIMEOUT
from tests.processes import ServeProcess, clean_environment

_CALLS = {
    ("POST", "/api/collab/sessions"): {"200", "201"},
    ("GET", "/api/collab/sessions"): {"200"},
    ("GET", "/api/collab/sessions/{id}"): {"200"},
    ("DELETE", "/api/collab/sessions/{id}"): {"204"},
    ("POST", "/api/collab/sessions/{id}/activity"): {"200"},
    ("POST", "/api/collab/sessions/{id}/events"): {"200", "201"},
    ("DELETE", "/api/collab/users/{userId}"): {"200"},
    ("POST", "/api/collab/events"): {"200", "201"},
    ("GET", "/api/collab/events"): {"200"},
}

# What is valid by the types, and refused all the same: a number beyond the head, a token that was not given, a payload
# beside another one, bytes that are no base64. Everything else has to hold, such as: no 5xx, answers and their types as
# described, what is not valid refused, other methods 405, what was deleted gone.
_SETTINGS = """
[checks.positive_data_acceptance]
enabled = false
[checks.negative_data_rejection]
expected-statuses = ["4xx"]
"""


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> Any:
    """The document."""
    answer = http.get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    return answer.json()


def test_it_is_valid(document: Any) -> None:
    """It is OpenAPI 3.1, by the schema that the specification comes with."""
    assert document["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(document)


def test_it_has_exactly_the_calls_of_the_contract(document: Any) -> None:
    """Each call with its statuses, a name of its own, a summary, and the shape of errors; and nothing else."""
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == set(_CALLS)
    for call, operation in operations.items():
        assert {status for status in operation["responses"] if status < "300"} == _CALLS[call]
        assert operation["summary"]
        for status, response in operation["responses"].items():
            assert response["description"]
            if status >= "400":
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names)
    listing = operations["GET", "/api/collab/events"]
    assert set(listing["responses"]["200"]["content"]) == {
        "application/json", "application/x-ndjson", "text/event-stream"
    }  # fmt: skip
    assert {parameter["name"] for parameter in listing["parameters"]} == {
        "sessionId", "sinceServerSeq", "limit", "types", "Last-Event-ID"
    }  # fmt: skip


def test_shapes_are_those_of_the_contract(document: Any) -> None:
    """Names in their order, what has to be there, and that nothing else is taken."""
    schemas = document["components"]["schemas"]
    assert list(schemas["SessionForm"]["properties"]) == schemas["SessionForm"]["required"] == SESSION_KEYS
    assert list(schemas["EventForm"]["properties"]) == [*EVENT_KEYS, "payloadBase64"]
    assert schemas["EventForm"]["required"] == EVENT_KEYS
    for name, required in (("SessionBody", []), ("EventBody", []), ("SessionEventBody", ["sessionId"])):
        assert schemas[name].get("required", []) == required
        assert schemas[name]["additionalProperties"] is False
    fields = {
        "actorId", "clientSeq", "type", "payload", "payloadBase64", "hash", "signature", "idempotencyKey"
    }  # fmt: skip
    assert set(schemas["EventBody"]["properties"]) == fields
    assert set(schemas["SessionEventBody"]["properties"]) == fields | {"sessionId", "expectedLastServerSeq"}
    assert set(schemas["SessionBody"]["properties"]) == {"languageId", "ownerId", "room"}
    assert list(schemas["ErrorAnswer"]["properties"]) == ["error", "message", "code", "details"]


def test_it_is_true(small_server: ServeProcess, directory: Path) -> None:
    """Whatever fits the document, or nearly does, is answered as the document says, and never with a fault.

    (The server is one on which no test needs a session of another's, since many are deleted.)
    """
    before = len(small_server.lines)
    (directory / "schemathesis.toml").write_text(_SETTINGS)
    url = f"http://{small_server.http_address}/openapi.json"
    result = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", url,
         "--max-examples", "25", "--seed", "1", "--generation-deterministic", "--request-timeout", str(TIMEOUT),
         "--no-color"],
        capture_output=True, text=True, timeout=100, cwd=directory, check=False,
        env=clean_environment() | {"PYTHONWARNINGS": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "9 selected / 9 total" in result.stdout
    assert not [line for line in small_server.lines[before:] if line.get("level") == "error"]
