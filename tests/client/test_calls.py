"""Every call of the client, and what comes back from it."""

import asyncio
import shutil
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from collab_service.client import (
    END,
    AppendedBatch,
    CollabClient,
    InvalidRequest,
    NewEvent,
    ServerSeqConflict,
    SessionNotFound,
    Unavailable,
)
from collab_service.v1 import collab_service_pb2 as pb
from tests.client.calls import THRICE, failure, unique
from tests.processes import ServeProcess
from tests.tcp import TcpProxy

MOST = 2**63 - 1


async def test_a_session_is_created_and_found(client: CollabClient) -> None:
    """A session comes back as it was created, by its id and by its room, and a room names one session."""
    room = unique("räum")
    before = datetime.now(UTC)
    session, created = await client.create_session(language_id=MOST, owner_id="ada", room=room)
    assert created
    assert (session.language_id, session.owner_id, session.room) == (MOST, "ada", room)
    assert (session.first_server_seq, session.last_server_seq, len(session.chain_hash)) == (1, 0, 32)
    assert session.created_at == session.last_active
    assert abs((session.created_at - before).total_seconds()) < 60
    assert await client.get_session(session.id) == session
    assert await client.get_session(room=room) == session
    assert await client.create_session(room=room, owner_id="bob") == (session, False)
    bare, created = await client.create_session()
    assert created
    assert (bare.language_id, bare.owner_id, bare.room) == (None, None, None)


async def test_sessions_are_listed(client: CollabClient) -> None:
    """All sessions with the filter come, each once, the most recently active first: at once, and page by page."""
    owner = unique("owner")
    ids = [(await client.create_session(owner_id=owner, language_id=1 + n % 2)).session.id for n in range(7)]
    await client.append(ids[2], NewEvent())
    assert (await client.touch_session(ids[4])).id == ids[4]
    wanted = [ids[4], ids[2], *(id_ for id_ in reversed(ids) if id_ not in (ids[4], ids[2]))]
    for page_size in (1, 2, 7, 1000):
        assert [s.id async for s in client.list_sessions(owner_id=owner, page_size=page_size)] == wanted
    assert {s.id async for s in client.list_sessions(owner_id=owner, language_id=2)} == set(ids[1::2])
    first = await client.list_sessions_page(owner_id=owner, page_size=3)
    second = await client.list_sessions_page(owner_id=owner, page_size=3, page_token=first.next_page_token)
    third = await client.list_sessions_page(owner_id=owner, page_size=3, page_token=second.next_page_token)
    assert [s.id for page in (first, second, third) for s in page.sessions] == wanted
    assert third.next_page_token == ""
    assert first.sessions[0] == await client.get_session(ids[4])
    assert [s async for s in client.list_sessions(owner_id=unique("nobody"))] == []


async def test_a_session_is_touched_and_deleted(client: CollabClient) -> None:
    """Touching moves its activity and nothing else; after deleting it is not there, and its room is free."""
    room = unique("room")
    session, _ = await client.create_session(room=room)
    touched = await client.touch_session(session.id)
    assert touched.last_active > session.last_active
    assert (touched.created_at, touched.last_server_seq) == (session.created_at, 0)
    await client.delete_session(session.id)
    with pytest.raises(SessionNotFound):
        await client.get_session(session.id)
    another, created = await client.create_session(room=room)
    assert created
    assert another.id != session.id


async def test_a_user_is_removed(client: CollabClient) -> None:
    """It is told how many sessions the user owned; they stay, and have no owner."""
    owner = unique("owner")
    ids = [(await client.create_session(owner_id=owner)).session.id for _ in range(3)]
    assert await client.remove_user(owner) == 3
    assert [(await client.get_session(id_)).owner_id for id_ in ids] == [None] * 3
    assert await client.remove_user(owner) == 0


async def test_a_batch_is_stored_whole(client: CollabClient) -> None:
    """Its events are neighbours, and what is returned tells where they are; a refused batch leaves nothing."""
    session, _ = await client.create_session()
    await client.append(session.id, NewEvent())
    batch = [NewEvent(client_seq=n) for n in range(1000)]
    appended = await client.append_batch(session.id, iter(batch))
    assert isinstance(appended, AppendedBatch)
    assert (appended.first_server_seq, appended.last_server_seq, appended.replayed) == (2, 1001, False)
    stored = [event async for event in client.read(session.id, since=1)]
    assert [event.client_seq for event in stored] == list(range(1000))
    assert {event.created_at for event in stored} == {appended.created_at}
    with pytest.raises(InvalidRequest):
        await client.append_batch(session.id, [NewEvent(), NewEvent("[]")])
    with pytest.raises(InvalidRequest):
        await client.append_batch(session.id, [])
    assert (await client.get_session(session.id)).last_server_seq == 1001


async def test_conditions(client: CollabClient) -> None:
    """An append that expects another last number is refused, and says which it is; nothing is written."""
    session, _ = await client.create_session()
    assert (await client.append(session.id, NewEvent(), expected_last_server_seq=0)).event.server_seq == 1
    assert (await client.append_batch(session.id, [NewEvent()] * 2, expected_last_server_seq=1)).last_server_seq == 3
    for expected in (0, 2, 4, MOST):
        with pytest.raises(ServerSeqConflict) as caught:
            await client.append(session.id, NewEvent(), expected_last_server_seq=expected)
        assert (caught.value.expected, caught.value.actual) == (expected, 3)
        with pytest.raises(ServerSeqConflict):
            await client.append_batch(session.id, [NewEvent()], expected_last_server_seq=expected)
    assert (await client.get_session(session.id)).last_server_seq == 3


async def test_keys(client: CollabClient) -> None:
    """With a caller's key the same append again returns the original and says so; without one it is another event."""
    session, _ = await client.create_session()
    event = NewEvent.of({"text": "hello"}, idempotency_key="k")
    first, again = [await client.append(session.id, event) for _ in range(2)]
    assert (first.replayed, again.replayed) == (False, True)
    assert again.event == first.event
    batch = [NewEvent(), NewEvent(idempotency_key="b")]
    one, two = [await client.append_batch(session.id, batch) for _ in range(2)]
    assert (one.replayed, two.replayed) == (False, True)
    assert two == one._replace(replayed=True)
    without = NewEvent.of({"text": "hello"})
    numbers = [(await client.append(session.id, without)).event.server_seq for _ in range(3)]
    assert numbers == [4, 5, 6]


async def test_keys_that_are_added(client: CollabClient) -> None:
    """An append without a key is given one of its own; a batch one on its first event, and none where it has one."""
    session, _ = await client.create_session()
    await client.append(session.id, NewEvent())
    await client.append(session.id, NewEvent(), auto_key=False)
    await client.append_batch(session.id, [NewEvent()] * 2)
    await client.append_batch(session.id, [NewEvent()] * 2, auto_key=False)
    await client.append_batch(session.id, [NewEvent(), NewEvent(idempotency_key="mine")])
    keys = [event.idempotency_key async for event in client.read(session.id)]
    assert [key is not None for key in keys] == [True, False, True, False, False, False, False, True]
    assert keys[7] == "mine"
    assert keys[0] != keys[2]


async def test_keys_are_of_one_process(server: ServeProcess) -> None:
    """Clients do not share keys, not even one that is opened twice, as in processes that were forked from one."""
    keys = set()
    client = CollabClient(server.grpc_address)
    for _ in range(2):
        async with client:
            session, _ = await client.create_session()
            keys.add((await client.append(session.id, NewEvent())).event.idempotency_key)
    async with CollabClient(server.grpc_address) as other:
        keys.add((await other.append(session.id, NewEvent())).event.idempotency_key)
    assert len({str(key).partition("-")[0] for key in keys}) == 3


async def test_reading(client: CollabClient) -> None:
    """From any number on, so many, of some types; as events and as pages, which tell how far they reach."""
    session, _ = await client.create_session()
    (empty,) = [page async for page in client.read_pages(session.id)]
    assert (empty.events, empty.through_server_seq, empty.is_caught_up) == ((), 0, True)
    await client.append_batch(session.id, [NewEvent(type=("a", "b", "c")[n % 3]) for n in range(1000)])
    await client.append_batch(session.id, [NewEvent(type="d")] * 200)

    async def numbers(**fields: object) -> list[int]:
        return [event.server_seq async for event in client.read(session.id, **fields)]  # type: ignore[arg-type]

    assert await numbers() == list(range(1, 1201))
    assert await numbers(since=1100) == list(range(1101, 1201))
    assert await numbers(since=1200) == []
    assert await numbers(since=10, limit=600) == list(range(11, 611))
    assert await numbers(types=["b"], limit=3) == [2, 5, 8]
    assert await numbers(types=("c", "d"), since=997) == [999, *range(1001, 1201)]
    assert await numbers(types=["none of them"]) == []
    pages = [page async for page in client.read_pages(session.id)]
    assert all(len(page.events) <= 500 for page in pages)
    assert [e.server_seq for page in pages for e in page.events] == list(range(1, 1201))
    assert [page.is_caught_up for page in pages] == [*[False] * (len(pages) - 1), True]
    assert {page.head_server_seq for page in pages} == {1200}
    (nothing,) = [page async for page in client.read_pages(session.id, types=["none of them"])]
    assert (nothing.events, nothing.through_server_seq, nothing.is_caught_up) == ((), 1200, True)
    (part,) = [page async for page in client.read_pages(session.id, limit=5)]
    assert (len(part.events), part.through_server_seq, part.is_caught_up) == (5, 5, False)


async def test_following_from_the_end(client: CollabClient) -> None:
    """`END` begins with what is appended from then on."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent()] * 3)
    numbers: list[int] = []
    async for page in client.follow_pages(session.id, since=END, limit=2):
        numbers += [event.server_seq for event in page.events]
        if page.is_caught_up and len(numbers) < 2:
            await client.append(session.id, NewEvent())
    assert numbers == [4, 5]


async def test_many_at_once(client: CollabClient) -> None:
    """Coroutines share one client: of 200 that append at the same time, each event is there, once."""
    session, _ = await client.create_session()
    appended = await asyncio.gather(*(client.append(session.id, NewEvent(client_seq=n)) for n in range(200)))
    assert sorted(a.event.server_seq for a in appended) == list(range(1, 201))
    stored = [event async for event in client.read(session.id)]
    assert {a.event for a in appended} == set(stored)
    assert sorted(event.client_seq or 0 for event in stored) == list(range(200))


async def test_health(client: CollabClient) -> None:
    """A service that works says so."""
    assert await client.is_serving()
    assert await client.is_serving(timeout=float("inf"))


async def test_a_client_that_is_not_open(server: ServeProcess) -> None:
    """Before and after its context there is no connection, and using it is a mistake that is told; it opens again."""
    client = CollabClient(server.grpc_address)
    for _ in range(2):
        for use in (
            lambda: client.get_session(1),
            lambda: client.is_serving(),
            lambda: anext(client.read(1)),
            lambda: anext(client.follow(1)),
            lambda: anext(client.list_sessions()),
        ):
            with pytest.raises(RuntimeError, match="not open"):
                await use()
        with pytest.raises(RuntimeError, match="not open"):
            client.read_pages(1)
        async with client:
            assert await client.is_serving()
            with pytest.raises(RuntimeError, match="open already"):
                await client.__aenter__()


async def test_a_session_is_asked_for_in_one_way(client: CollabClient) -> None:
    """By its id or by its room, not by both or by nothing."""
    with pytest.raises(TypeError):
        await client.get_session()
    with pytest.raises(TypeError):
        await client.get_session(1, room="r")


async def test_timeouts_that_never_end(client: CollabClient) -> None:
    """A timeout may be infinite."""
    forever = float("inf")
    session, _ = await client.create_session(timeout=forever)
    async with asyncio.timeout(30):
        await client.append(session.id, NewEvent(), timeout=forever)
        await client.append_batch(session.id, [NewEvent()], timeout=1e12)
        assert len([event async for event in client.read(session.id, timeout=forever)]) == 2
        assert [e.server_seq async for e in client.follow(session.id, limit=2, timeout=forever)] == [1, 2]


@pytest.fixture(scope="session")
def certificate(run_directory: Path) -> tuple[Path, Path]:
    """A certificate of `localhost` that it has signed itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = run_directory / "certificate.pem", run_directory / "key.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = [openssl, *words.split(), "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def test_tls(server: ServeProcess, certificate: tuple[Path, Path]) -> None:
    """With credentials the client speaks TLS, and to nobody whose certificate they do not know."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    tls.set_alpn_protocols(["h2"])
    known = grpc.ssl_channel_credentials(certificate[0].read_bytes())
    async with TcpProxy(server.grpc_address, tls) as proxy:
        target = proxy.address.replace("127.0.0.1", "localhost")
        async with CollabClient(target, credentials=known) as client:
            session, _ = await client.create_session()
            assert (await client.append(session.id, NewEvent())).event.server_seq == 1
            assert [event.server_seq async for event in client.follow(session.id, limit=1)] == [1]
        for credentials in (grpc.ssl_channel_credentials(), None):
            async with CollabClient(target, credentials=credentials, retry=THRICE) as stranger:
                error = await failure(stranger.create_session())
                assert (type(error), error.side_effects) == (Unavailable, "none")


async def test_connections(server: ServeProcess) -> None:
    """Clients of one process share a connection, unless they are told to have their own."""
    for options, connections in (((), 1), ([("grpc.use_local_subchannel_pool", 1)], 2)):
        async with (
            TcpProxy(server.grpc_address) as proxy,
            CollabClient(proxy.address, options=options) as one,
            CollabClient(proxy.address, options=options) as other,
        ):
            assert await one.is_serving()
            assert await other.is_serving()
            assert proxy.accepted == connections


async def test_the_stub_is_there(client: CollabClient) -> None:
    """Who wants the protobuf messages calls the generated stub on the same connection."""
    session, _ = await client.create_session()
    response = await client.stub.AppendEvent(pb.AppendEventRequest(session_id=session.id, event=pb.NewEvent(json="{}")))
    assert response.event.server_seq == 1


async def test_options_of_the_caller_win(server: ServeProcess, client: CollabClient) -> None:
    """A channel argument given to the client replaces its own."""
    session, _ = await client.create_session()
    await client.append(session.id, NewEvent.of({"text": "x" * 2_000}))
    async with CollabClient(server.grpc_address, options=[("grpc.max_receive_message_length", 1_000)]) as small:
        assert (await small.get_session(session.id)).last_server_seq == 1
        with pytest.raises(InvalidRequest, match="larger than max"):
            await anext(small.read(session.id))
