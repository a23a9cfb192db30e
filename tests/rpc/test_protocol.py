"""gRPC as people expect it: reflection, health, request ids, cancellation and deadlines."""

import json
import subprocess
import sys
import time
from pathlib import Path

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import append, events, failure, new_session, raw_call

BUF = Path(sys.executable).parent / "buf"


def buf_curl(server: ServeProcess, *arguments: str) -> str:
    """Call the server as `buf curl` does, with reflection and no proto files."""
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    return result.stdout + result.stderr


def test_reflection_lists_and_calls_everything(server: ServeProcess) -> None:
    """Tools list the services and call every RPC with no proto files."""
    url = f"http://{server.grpc_address}"
    assert set(buf_curl(server, "--list-services", url).split()) == {
        "collab_service.v1.CollabService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    methods = buf_curl(server, "--list-methods", url).split()
    ours = [m for m in methods if m.startswith("collab_service.v1.CollabService/")]
    assert len(ours) == len(pb.DESCRIPTOR.services_by_name["CollabService"].methods)

    def call(method: str, **request: object) -> dict[str, object]:
        answer: dict[str, object] = json.loads(
            buf_curl(server, "-d", json.dumps(request), f"{url}/collab_service.v1.CollabService/{method}")
        )
        return answer

    session = call("CreateSession", ownerId="ada")["session"]
    assert isinstance(session, dict)
    appended = call("AppendEvent", sessionId=session["id"], event={"json": '{"a": 1}'})
    listed = call("ListEvents", sessionId=session["id"])
    assert listed["events"] == [appended["event"]]
    refused = call("AppendEvent", sessionId="-1", event={})
    assert refused["code"] == "invalid_argument"


def test_health_follows_the_server(channel: grpc.Channel) -> None:
    """The standard health service knows the server and the service, and nothing else."""
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "collab_service.v1.CollabService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_unknown_methods(channel: grpc.Channel) -> None:
    """A method that does not exist is UNIMPLEMENTED."""
    error = raw_call(channel, "Nothing", b"")
    assert error is not None
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_failed_call_can_be_found_in_the_log(stub: CollabServiceStub, server: ServeProcess) -> None:
    """One log line for every failed call, with the caller's request id, or one made up; never a payload."""
    request = pb.AppendEventRequest(session_id=10**15, event=pb.NewEvent(actor_id="secret-person"))
    for given, kept in (("my-request-1", True), ("not a good one", False), ("x" * 129, False)):
        metadata = (("x-request-id", given),)
        failed = failure(lambda metadata=metadata: stub.AppendEvent(request, metadata=metadata))  # type: ignore[misc]
        request_id = failed.trailing["x-request-id"]
        assert (request_id == given) == kept
        line = server.wait_for("call failed", request_id=request_id)
        assert (line["method"], line["reason"]) == ("AppendEvent", "SESSION_NOT_FOUND")
    assert "secret-person" not in server.text()


def test_deadlines_are_honoured_while_waiting(
    stub: CollabServiceStub, server: ServeProcess, server_database_url: str
) -> None:
    """A caller whose deadline has passed, or who has cancelled, is not written."""
    session = new_session(stub)
    with psycopg.connect(server_database_url) as connection:
        connection.execute("SELECT id FROM collab_sessions WHERE id = %s FOR UPDATE", (session,))
        calls = [
            stub.AppendEvent.future(
                pb.AppendEventRequest(session_id=session, event=pb.NewEvent(type=f"late-{n}")), timeout=0.3
            )
            for n in range(5)
        ]
        cancelled = stub.AppendEvent.future(
            pb.AppendEventRequest(session_id=session, event=pb.NewEvent()),
            timeout=30,
            metadata=(("x-request-id", "given-up"),),
        )
        started = time.monotonic()
        for call in calls:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 5
        cancelled.cancel()
        server.wait_for("call was cancelled", request_id="given-up")
        # Later in line than all of them, and not given up: once it is stored, they have been passed over.
        last = stub.AppendEvent.future(
            pb.AppendEventRequest(session_id=session, event=pb.NewEvent(type="last")), timeout=30
        )
    assert last.result().event.server_seq == 1
    assert [event.type for event in events(stub, session)] == ["last"]


def test_a_reader_that_leaves_is_forgotten(stub: CollabServiceStub) -> None:
    """Cancelling a list half-way harms nobody."""
    session = new_session(stub)
    for _ in range(8):
        append(stub, session, binary=b"x" * 1_000_000)
    for _ in range(20):
        stream = stub.ListEvents(pb.ListEventsRequest(session_id=session))
        next(stream)
        stream.cancel()
    assert len(events(stub, session)) == 8
