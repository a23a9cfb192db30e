"""Errors: each has its class, and says what happened, why, and whether anything was written."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from collab_service.client import (
    CollabClient,
    DeadlineExceeded,
    IdempotencyKeyReused,
    InternalError,
    InvalidRequest,
    NewEvent,
    OutcomeUnknown,
    Overloaded,
    ServerSeqBeyondHead,
    ServerSeqCompacted,
    ServerSeqConflict,
    ServiceError,
    SessionNotFound,
    TooLarge,
    Unavailable,
    errors,
    request_id,
)
from collab_service.model.errors import Reason
from collab_service.rpc.status import CODES
from collab_service.storage.embedded import Cluster
from tests.client.answering import REQUEST_ID, AnsweringService, Refusal
from tests.client.calls import MISSING, ONCE, THRICE, failure, unique
from tests.processes import ServeProcess
from tests.tcp import TcpProxy
from tests.waiting import until


def assert_answered(error: ServiceError, kind: type[ServiceError], reason: str) -> None:
    """Assert that an error is the service's own answer, by which nothing was written."""
    assert (type(error), error.reason, error.side_effects) == (kind, reason, "none")
    assert error.request_id
    assert "side_effects" not in error.metadata
    assert str(error)


def subclasses(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    """Yield all kinds of an error."""
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_the_tree_is_drawn() -> None:
    """The tree in the docstring is the tree of classes, complete; each has a sentence and is public."""
    drawn: dict[str, str | None] = {}
    path: list[str] = []
    for indent, name in re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)\b", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4
        path[depth:] = [name]
        drawn[name] = path[depth - 1] if depth else None
    classes: dict[str, str | None] = {"ServiceError": None}
    for kind in subclasses(ServiceError):
        (base,) = kind.__bases__
        classes[kind.__name__] = base.__name__
        assert (kind.__doc__ or "").endswith(".")
    assert drawn == classes


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_has_its_class(reason: Reason) -> None:
    """Whatever the service may answer, also what it does not answer yet, has a class, which tells what may help."""
    kinds = {
        Reason.EVENT_TOO_LARGE: TooLarge,
        Reason.BATCH_TOO_LARGE: TooLarge,
        Reason.IDEMPOTENCY_KEY_REUSED: IdempotencyKeyReused,
        Reason.SESSION_NOT_FOUND: SessionNotFound,
        Reason.SERVER_SEQ_CONFLICT: ServerSeqConflict,
        Reason.SERVER_SEQ_BEYOND_HEAD: ServerSeqBeyondHead,
        Reason.SERVER_SEQ_COMPACTED: ServerSeqCompacted,
        Reason.OVERLOADED: Overloaded,
        Reason.TOO_MANY_FOLLOWERS: Overloaded,
        Reason.STORAGE_UNAVAILABLE: Unavailable,
        Reason.SHUTTING_DOWN: Unavailable,
        Reason.COMMIT_OUTCOME_UNKNOWN: OutcomeUnknown,
        Reason.INTERNAL: InternalError,
    }
    numbers = {"expected": "3", "actual": "5", "head": "6", "first": "7"}
    unknown = "unknown" if reason is Reason.COMMIT_OUTCOME_UNKNOWN else "none"
    refusal = Refusal(CODES[reason], reason, "a sentence", retry_after=0.25, side_effects=unknown, **numbers)
    async with AnsweringService(refusal) as service, CollabClient(service.address, retry=ONCE) as client:
        error = await failure(client.append(1, NewEvent()))
        assert type(await failure(anext(client.follow(1)))) is type(error)
    assert type(error) is kinds.get(reason, InvalidRequest)
    assert (str(error), error.reason, error.side_effects) == ("a sentence", reason, unknown)
    assert (error.retry_after, error.request_id, error.metadata) == (0.25, REQUEST_ID, numbers)
    assert error.is_retryable == (CODES[reason] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED))
    if isinstance(error, ServerSeqConflict):
        assert (error.expected, error.actual) == (3, 5)
    if isinstance(error, ServerSeqBeyondHead):
        assert error.head == 6
    if isinstance(error, ServerSeqCompacted):
        assert error.first == 7


@pytest.mark.parametrize(
    ("code", "kind", "side_effects"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable, "unknown"),
        (grpc.StatusCode.CANCELLED, Unavailable, "unknown"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded, "unknown"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded, "unknown"),
        (grpc.StatusCode.UNKNOWN, InternalError, "unknown"),
        (grpc.StatusCode.NOT_FOUND, InternalError, "unknown"),
        (grpc.StatusCode.PERMISSION_DENIED, InternalError, "unknown"),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError, "none"),
    ],
)
async def test_answers_of_others(code: grpc.StatusCode, kind: type[ServiceError], side_effects: str) -> None:
    """What comes without details is not the service's own: no session is missing, and a write may have taken place."""
    refusal = Refusal(code, message="says a proxy")
    async with AnsweringService(refusal) as service, CollabClient(service.address, retry=ONCE) as client:
        writing, reading = await failure(client.append(1, NewEvent())), await failure(client.get_session(1))
        following = await failure(anext(client.follow(1)))
    assert (type(writing), writing.side_effects) == (kind, side_effects)
    for error in (reading, following):
        assert (type(error), error.side_effects) == (kind, "none")
    assert (writing.reason, writing.request_id, writing.metadata) == ("", "", {})
    if code is not grpc.StatusCode.CANCELLED:
        assert "says a proxy" in str(writing)


async def test_sessions_that_are_not_there(client: CollabClient) -> None:
    """Every call on a session says that there is none."""
    for call in (
        lambda: client.get_session(MISSING),
        lambda: client.touch_session(MISSING),
        lambda: client.delete_session(MISSING),
        lambda: client.append(MISSING, NewEvent()),
        lambda: client.append_batch(MISSING, [NewEvent()]),
        lambda: anext(client.read(MISSING)),
        lambda: anext(client.read_pages(MISSING)),
        lambda: anext(client.follow(MISSING)),
        lambda: anext(client.follow(MISSING, since=-1)),
    ):
        error = await failure(call())
        assert_answered(error, SessionNotFound, "SESSION_NOT_FOUND")
        assert error.metadata == {"session_id": str(MISSING)}
    error = await failure(client.get_session(room="no such room"))
    assert_answered(error, SessionNotFound, "SESSION_NOT_FOUND")
    assert error.metadata == {"room": "no such room"}


async def test_calls_are_named(server: ServeProcess, client: CollabClient) -> None:
    """A caller's name for its calls is the error's and stands in the service's log; what cannot be one is left out."""
    mine = unique("request")
    token = request_id.set(mine)
    try:
        for call in (lambda: client.get_session(MISSING), lambda: anext(client.read(MISSING))):
            assert (await failure(call())).request_id == mine
        for method in ("GetSession", "ListEvents"):
            server.wait_for("call failed", method=method, request_id=mine)
        for wrong in ("", "ü", "two words", "two\nlines", "\x00", "x" * 129):
            request_id.set(wrong)
            for call in (lambda: client.get_session(MISSING), lambda: anext(client.read(MISSING))):
                assert (await failure(call())).request_id not in ("", wrong)
    finally:
        request_id.reset(token)


async def test_numbers_that_do_not_fit(client: CollabClient) -> None:
    """A conflict tells both numbers, and reading beyond the head where the head is."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent()] * 3)
    conflict = await failure(client.append(session.id, NewEvent(), expected_last_server_seq=2))
    assert_answered(conflict, ServerSeqConflict, "SERVER_SEQ_CONFLICT")
    assert isinstance(conflict, ServerSeqConflict)
    assert (conflict.expected, conflict.actual, conflict.is_retryable) == (2, 3, False)
    for since in (4, MISSING):
        for method in (client.read, client.follow):
            beyond = await failure(anext(method(session.id, since=since)))
            assert_answered(beyond, ServerSeqBeyondHead, "SERVER_SEQ_BEYOND_HEAD")
            assert isinstance(beyond, ServerSeqBeyondHead)
            assert (beyond.head, beyond.metadata["since"]) == (3, str(since))


def fields(error: ServiceError) -> set[str]:
    """Return the names of the bad fields, of which each has to be told what would be right."""
    assert isinstance(error, InvalidRequest)
    assert all(violation.message for violation in error.violations)
    return {violation.field for violation in error.violations}


async def test_every_bad_field_is_told_at_once(client: CollabClient) -> None:
    """What the service refuses names all that is wrong with a request."""
    bad = NewEvent("[]", actor_id="", client_seq=-1, type="\0", hash="h" * 256, signature=b"s" * 1025)
    error = await failure(client.append(0, bad, expected_last_server_seq=-1))
    assert_answered(error, InvalidRequest, "INVALID_REQUEST")
    assert not error.is_retryable
    assert fields(error) == {
        "session_id",
        "expected_last_server_seq",
        *(f"event.{name}" for name in ("actor_id", "client_seq", "type", "hash", "signature", "json")),
    }
    for call, names in (
        (lambda: client.create_session(language_id=0, owner_id="", room="\0"), {"language_id", "owner_id", "room"}),
        (lambda: client.list_sessions_page(page_size=-1, owner_id=""), {"page_size", "owner_id"}),
        (
            lambda: client.append_batch(1, [NewEvent(), NewEvent(type=""), NewEvent("1")]),
            {"events[1].type", "events[2].json"},
        ),
        (
            lambda: anext(client.read(0, since=-1, limit=-1, types=[""])),
            {"session_id", "since_server_seq", "limit", "types[0]"},
        ),
        (lambda: anext(client.follow(1, since=-2)), {"since_server_seq"}),
        (lambda: client.remove_user(""), {"user_id"}),
        (lambda: client.get_session(room=""), {"room"}),
        (lambda: client.touch_session(-1), {"session_id"}),
        (lambda: client.delete_session(-1), {"session_id"}),
    ):
        assert fields(await failure(call())) == names
    json = await failure(client.append(1, NewEvent("{")))
    assert_answered(json, InvalidRequest, "PAYLOAD_NOT_A_JSON_OBJECT")
    assert fields(json) == {"event.json"}
    token = await failure(client.list_sessions_page(page_token="made up"))
    assert_answered(token, InvalidRequest, "PAGE_TOKEN_INVALID")
    assert fields(token) == {"page_token"}


async def test_what_cannot_be_sent(client: CollabClient) -> None:
    """A value that its field cannot hold is refused before anything is sent, and the field is named."""
    anything: Any = object()
    for call, names in (
        (lambda: client.get_session(2**63), {"session_id"}),
        (lambda: client.get_session(anything), {"session_id"}),
        (
            lambda: client.create_session(language_id=-(2**64), owner_id="\ud800", room="fine"),
            {"language_id", "owner_id"},
        ),
        (lambda: client.list_sessions_page(page_size=2**31, page_token=anything), {"page_size", "page_token"}),
        (
            lambda: client.append(2**63, NewEvent(), expected_last_server_seq=-(2**64)),
            {"session_id", "expected_last_server_seq"},
        ),
        (lambda: client.append(1, NewEvent(client_seq=2**63, type=anything)), {"event.client_seq", "event.type"}),
        (lambda: client.append(1, NewEvent(anything)), {"event.payload"}),
        (lambda: client.append(1, NewEvent(signature=anything)), {"event.signature"}),
        (lambda: client.append_batch(1, [NewEvent(), NewEvent(anything)]), {"events[1].payload"}),
        (lambda: client.append_batch(1, [NewEvent(hash="\udc80")]), {"events[0].hash"}),
        (lambda: anext(client.read(1, since=2**63, limit=anything)), {"since_server_seq", "limit"}),
        (lambda: anext(client.read(1, types="edit")), {"types"}),
        (lambda: anext(client.follow(1, types="edit")), {"types"}),
        (lambda: anext(client.follow(2**63)), {"session_id"}),
    ):
        error = await failure(call())
        assert fields(error) == names
        assert (error.reason, error.side_effects, error.request_id) == ("INVALID_REQUEST", "none", "")
        assert all(name in str(error) for name in names)
        assert len(str(error)) < 1_000


async def test_too_large(client: CollabClient) -> None:
    """An event or a batch over a limit says so, as does a message that the transport refuses."""
    session, _ = await client.create_session()
    event = await failure(client.append(session.id, NewEvent(b"x" * (2**20 + 1))))
    assert_answered(event, TooLarge, "EVENT_TOO_LARGE")
    assert fields(event) == {"event.binary"}
    for batch in ([NewEvent()] * 1001, [NewEvent(b"x" * 2**20)] * 5):
        error = await failure(client.append_batch(session.id, batch))
        assert_answered(error, TooLarge, "BATCH_TOO_LARGE")
        assert fields(error) == {"events"}
    message = await failure(client.append_batch(session.id, [NewEvent(b"x" * 2**20)] * 9))
    assert (type(message), message.reason, message.side_effects) == (TooLarge, "", "none")
    assert (await client.get_session(session.id)).last_server_seq == 0


async def test_an_answer_that_is_too_large(server: ServeProcess, client: CollabClient) -> None:
    """Where the caller has bounded what it receives, an append whose answer is refused has taken place."""
    session, _ = await client.create_session()
    event = NewEvent.of({"text": "x" * 2_000})
    async with CollabClient(server.grpc_address, options=[("grpc.max_receive_message_length", 1_000)]) as small:
        error = await failure(small.append(session.id, event))
    assert (type(error), error.side_effects) == (TooLarge, "unknown")
    assert (await client.get_session(session.id)).last_server_seq == 1
    async with CollabClient(server.grpc_address, options=[("grpc.max_send_message_length", 1_000)]) as small:
        error = await failure(small.append(session.id, event))
    assert (type(error), error.side_effects) == (TooLarge, "none")
    assert (await client.get_session(session.id)).last_server_seq == 1


async def test_a_key_that_is_used_again(client: CollabClient) -> None:
    """The same key with other content names the events whose keys are stored."""
    session, _ = await client.create_session()
    await client.append(session.id, NewEvent(idempotency_key="k"))
    error = await failure(client.append(session.id, NewEvent(idempotency_key="k", type="other")))
    assert_answered(error, IdempotencyKeyReused, "IDEMPOTENCY_KEY_REUSED")
    assert fields(error) == {"event.idempotency_key"}
    error = await failure(client.append_batch(session.id, [NewEvent(), NewEvent(idempotency_key="k")]))
    assert_answered(error, IdempotencyKeyReused, "IDEMPOTENCY_KEY_REUSED")
    assert fields(error) == {"events[1].idempotency_key"}
    assert error.metadata == {"known_indexes": "1"}


async def test_nobody_listens() -> None:
    """Where there is no service, it is said to whom it was tried to connect, and nothing was written."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        async with CollabClient(address, retry=THRICE) as client:
            for call in (
                lambda: client.get_session(1),
                lambda: client.append(1, NewEvent()),
                lambda: client.append(1, NewEvent(), auto_key=False),
                lambda: client.create_session(),
                lambda: client.delete_session(1),
                lambda: client.is_serving(),
                lambda: anext(client.read(1)),
                lambda: anext(client.follow(1)),
                lambda: anext(client.follow(1, since=-1)),
            ):
                error = await failure(call())
                assert (type(error), error.reason, error.side_effects) == (Unavailable, "", "none")
                assert address in str(error)
                assert error.is_retryable


async def test_a_name_that_nobody_has() -> None:
    """A name that cannot be resolved is a service that does not answer."""
    async with CollabClient("collab.invalid:50051", retry=ONCE) as client:
        error = await failure(client.append(1, NewEvent()))
    assert (type(error), error.side_effects) == (Unavailable, "none")
    assert "collab.invalid" in str(error)


@pytest.fixture
async def web_server() -> AsyncIterator[str]:
    """The address of a server that speaks HTTP/1 and no gRPC."""

    connections: list[asyncio.Task[None]] = []

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.create_task(answer(reader, writer)))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(accepted, "127.0.0.1", 0) as web:
        host, port = web.sockets[0].getsockname()
        yield f"{host}:{port}"
        await asyncio.gather(*connections, return_exceptions=True)


async def test_something_else_listens(web_server: str) -> None:
    """A server of another kind is no service; what it said is told."""
    async with CollabClient(web_server, retry=THRICE) as client:
        for call in (lambda: client.create_session(), lambda: client.is_serving(), lambda: anext(client.follow(1))):
            error = await failure(call())
            assert (type(error), error.side_effects) == (Unavailable, "none")
            assert web_server in str(error)
            assert "HTTP status 400" in str(error)


async def test_no_answer_in_time(cut_client: CollabClient, proxy: TcpProxy) -> None:
    """A call that is not answered ends with its timeout; what it wrote is unknown, a read has written nothing."""
    session, _ = await cut_client.create_session()
    proxy.hold()
    reading = await failure(cut_client.get_session(session.id, timeout=0.2))
    assert (type(reading), reading.side_effects) == (DeadlineExceeded, "none")
    writing = await failure(cut_client.append(session.id, NewEvent(), timeout=0.2))
    assert (type(writing), writing.side_effects) == (DeadlineExceeded, "unknown")
    async with asyncio.timeout(3):  # before the connection is found to be dead
        following = await failure(anext(cut_client.follow(session.id, timeout=0.2)))
    assert (type(following), following.side_effects) == (Unavailable, "none")
    proxy.release()


async def test_overload(small_server: ServeProcess) -> None:
    """A service that is asked for more than it accepts says when to come again; retries get everything through."""
    async with (
        CollabClient(small_server.grpc_address) as client,
        CollabClient(small_server.grpc_address, retry=ONCE) as once,
    ):
        session, _ = await client.create_session()
        tries = [once.append(session.id, NewEvent(client_seq=n)) for n in range(100)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        refused = [error for error in results if isinstance(error, ServiceError)]
        for error in refused:
            assert_answered(error, Overloaded, "OVERLOADED")
            assert error.is_retryable
            assert error.retry_after == 0.1
        assert refused
        assert (await client.get_session(session.id)).last_server_seq == 100 - len(refused)
        # Nothing is written by an attempt that is refused, so that no key is needed to repeat it.
        appends = [client.append(session.id, NewEvent(type="more"), auto_key=False) for _ in range(20)]
        await asyncio.gather(*appends)
        assert len([e async for e in client.read(session.id, types=["more"])]) == 20

        follow = client.follow_pages(session.id)
        await anext(follow)
        error = await failure(anext(once.follow(session.id)))
        assert_answered(error, Overloaded, "TOO_MANY_FOLLOWERS")
        assert error.retry_after == 1
        waiting = asyncio.ensure_future(anext(client.follow_pages(session.id)))
        await follow.aclose()
        assert (await waiting).is_caught_up


async def test_the_database_goes_and_comes(own_cluster: Cluster, directory: Path) -> None:
    """Without its database the service is not serving and says so; a call made meanwhile succeeds once it is back."""
    with ServeProcess("--database-url", own_cluster.url, cwd=directory) as server:
        async with CollabClient(server.grpc_address) as client, CollabClient(server.grpc_address, retry=ONCE) as once:
            session, _ = await client.create_session()
            await asyncio.to_thread(own_cluster.stop)
            for call in (
                lambda: once.append(session.id, NewEvent(), auto_key=False),
                lambda: once.create_session(),
                lambda: once.get_session(session.id),
                lambda: anext(once.read(session.id)),
            ):
                error = await failure(call())
                assert_answered(error, Unavailable, "STORAGE_UNAVAILABLE")
                assert error.retry_after == 1

            async def is_serving(wanted: bool) -> bool:
                return await client.is_serving() is wanted

            await until(lambda: is_serving(False), "health without the database")
            # None needs a key: nothing was written.
            waiting = [
                asyncio.create_task(client.append(session.id, NewEvent(), auto_key=False)),
                asyncio.create_task(client.create_session()),
                asyncio.create_task(client.remove_user("nobody")),
            ]
            await asyncio.to_thread(own_cluster.start)
            await asyncio.gather(*waiting)
            await until(lambda: is_serving(True), "health with the database")
            assert [e.server_seq async for e in client.read(session.id)] == [1]


async def test_a_fault_of_the_service(small_server: ServeProcess, small_database_url: str) -> None:
    """A fault is no reason to try again; its id stands in the service's log."""
    async with CollabClient(small_server.grpc_address) as client:
        session, _ = await client.create_session()
        with psycopg.connect(small_database_url, autocommit=True) as connection:
            connection.execute("ALTER TABLE collab_events RENAME TO mislaid")
            try:
                for call in (lambda: client.append(session.id, NewEvent()), lambda: anext(client.read(session.id))):
                    await assert_internal(call, small_server)
            finally:
                connection.execute("ALTER TABLE mislaid RENAME TO collab_events")


async def assert_internal(call: Callable[[], Awaitable[object]], server: ServeProcess) -> None:
    """Assert that a call is answered with an error that can be found in the log."""
    error = await failure(call())
    assert_answered(error, InternalError, "INTERNAL")
    assert not error.is_retryable
    assert error.metadata == {"error_id": error.request_id}
    assert "mislaid" not in str(error)
    server.wait_for("call failed", reason="INTERNAL", request_id=error.request_id)
