"""What goes wrong: each fault is made for real, lasts for a moment, and heals."""

import asyncio
import math
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from msgspec import Struct

from collab_service.v1 import collab_service_pb2 as pb
from tests.cli.test_workers import is_running
from tests.http2 import EMPTY_SETTINGS, PREFACE, FollowConnection
from tests.proxy import COMMITTED, INSERTED, INSERTING, INSERTING_BEHIND_HEADS
from tests.torture.ground import WORKERS, ClientWire, Ground
from tests.torture.history import Fault, History
from tests.waiting import until

_BUSY_BACKENDS = """
SELECT pid FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle' AND query ILIKE ANY (%s)
"""
_END_SERVICE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'collab-service'
"""
_WRITING = ["COMMIT%", "%INSERT INTO collab_events%", "%FOR UPDATE%"]
_LOOKS = 300
"""Looks for a backend that is at work, one behind the other."""
_HEALING = 60.0
"""Seconds in which everything has to be there again."""


class Field(Struct):
    """Where faults are made, and by what chances."""

    ground: Ground
    random: random.Random
    sessions: Sequence[int]


Make = Callable[[Field], Awaitable[str]]
"""Makes a fault and heals it; returns what may be of interest about it."""


class Missed(Exception):
    """There was nothing to damage at that moment."""


async def _pause(field: Field, least: float, most: float) -> None:
    """Let a fault last."""
    await asyncio.sleep(field.random.uniform(least, most))


async def kill_worker(field: Field) -> str:
    """SIGKILL one worker; its parent starts another."""
    workers = _workers(field)
    os.kill(field.random.choice(workers), signal.SIGKILL)
    await _pause(field, 0.1, 0.5)
    return f"of {len(workers)}"


async def kill_workers(field: Field) -> str:
    """SIGKILL all workers."""
    workers = _workers(field)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    await _pause(field, 0.1, 0.5)
    return f"of {len(workers)}"


async def kill_parent(field: Field) -> str:
    """SIGKILL the parent, whose workers then end; start everything again."""
    await field.ground.service.kill_parent()
    await field.ground.service.start()
    return ""


async def stop_service(field: Field) -> str:
    """Stop the service in order, as for an upgrade, and start it again."""
    status = await field.ground.service.stop()
    await field.ground.service.start()
    return f"exit status {status}"


async def freeze_worker(field: Field) -> str:
    """SIGSTOP one worker for 1 to 3 s."""
    workers = _workers(field)
    await _frozen(field, field.random.choice(workers), 1.0, 3.0)
    return f"of {len(workers)}"


async def stop_postgres_fast(field: Field) -> str:
    """Stop PostgreSQL fast, which ends its connections, and start it again."""
    await field.ground.postgres.restart(signal.SIGINT)
    return ""


async def stop_postgres_immediately(field: Field) -> str:
    """Stop PostgreSQL without a checkpoint, and start it again."""
    await field.ground.postgres.restart(signal.SIGQUIT)
    return ""


async def kill_postgres(field: Field) -> str:
    """SIGKILL the postmaster and all backends, and start PostgreSQL again."""
    await field.ground.postgres.restart(signal.SIGKILL)
    return ""


async def terminate_backends(field: Field) -> str:
    """Terminate up to three backends that are writing, above all in the middle of a COMMIT."""
    ended = 0
    query = field.random.choice((_WRITING, _WRITING[:1], _WRITING[1:2]))
    async with await psycopg.AsyncConnection.connect(field.ground.postgres.url, autocommit=True) as connection:
        for _ in range(_LOOKS):
            cursor = await connection.execute(
                f"SELECT pg_terminate_backend(pid) FROM ({_BUSY_BACKENDS} LIMIT 1) AS busy", [query]
            )
            ended += cursor.rowcount
            if ended >= 3:
                break
    if not ended:
        raise Missed(f"none of {query}")
    return f"{ended} of {query}"


async def freeze_backend(field: Field) -> str:
    """SIGSTOP a backend that is writing, for 0.2 to 2 s."""
    async with await psycopg.AsyncConnection.connect(field.ground.postgres.url, autocommit=True) as connection:
        for _ in range(_LOOKS):
            row = await (await connection.execute(f"{_BUSY_BACKENDS} LIMIT 1", [_WRITING])).fetchone()
            if row is not None:
                await _frozen(field, row[0], 0.2, 2.0)
                return "one"
    raise Missed("none was writing")


async def lose_commit(field: Field) -> str:
    """Lose the service's connection just before the database's word that a commit took place."""
    return await _cut_once(field, field.random.choice((COMMITTED, INSERTED)), from_server=True)


async def lose_statement(field: Field) -> str:
    """Lose the service's connection just before what it has the database insert."""
    return await _cut_once(field, field.random.choice((INSERTING, INSERTING_BEHIND_HEADS)), from_server=False)


async def delay_statement(field: Field) -> str:
    """Lose the service's connection as it inserts in one statement, and let the statement through a little later."""
    wire = field.ground.wire
    before = wire.cuts
    wire.cut_before_client_says(INSERTING_BEHIND_HEADS, late=True)
    try:
        await _soon(lambda: wire.cuts > before, "nothing was inserted")
        await _pause(field, 0.0, 0.05)
    finally:
        wire.heal()
    return ""


async def cut_clients(field: Field) -> str:
    """Cut all connections of the clients behind the wire, and accept none for a moment."""
    clients = await _clients(field)
    clients.refuse()
    clients.cut()
    try:
        await _pause(field, 0.0, 0.5)
    finally:
        clients.accept()
    return ""


async def lose_answer(field: Field) -> str:
    """Cut a client's connection as the service answers a call that it has carried out."""
    clients = field.ground.clients
    before = clients.cuts
    clients.lose_answer()
    await _soon(lambda: clients.cuts > before, "nothing was answered")
    return ""


async def delay_answers(field: Field) -> str:
    """Hold back for a while what the service says to the clients behind the wire."""
    clients = await _clients(field)
    clients.hold()
    try:
        await _pause(field, 0.2, 2.0)
    finally:
        clients.release()
    return ""


async def half_close(field: Field) -> str:
    """Close the clients' connections towards the service only."""
    (await _clients(field)).half_close()
    await _pause(field, 0.1, 0.3)
    return ""


async def throttle_clients(field: Field) -> str:
    """Let through a few kilobytes a second of what clients and service say to each other."""
    clients = await _clients(field)
    clients.throttle(20_000)
    try:
        await _pause(field, 0.5, 2.0)
    finally:
        clients.throttle(math.inf)
    return ""


async def send_garbage(field: Field) -> str:
    """Connect and send what is no HTTP/2, or begins like it, and vanish."""
    host, _, port = field.ground.service.address.rpartition(":")
    await _serves(field)
    sent = 0
    for _ in range(20):
        begin = field.random.choice((b"", PREFACE, PREFACE + EMPTY_SETTINGS, b"POST / HTTP/1.1\r\n"))
        with suppress(OSError):  # the service may be away
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(begin + field.random.randbytes(field.random.randrange(2_000)))
            await _pause(field, 0.0, 0.05)
            writer.transport.abort()
            sent += 1
    return f"{sent} times"


async def stall_readers(field: Field) -> str:
    """Follow every session from its beginning, take next to nothing of it, and vanish."""
    connections = []
    await _serves(field)
    try:
        for session in field.sessions:
            connection = await FollowConnection.open(
                field.ground.service.address, lambda stream, message: None, window=1_000, answer_pings=False
            )
            connections.append(connection)
            for _ in range(10):
                connection.follow(pb.ListEventsRequest(session_id=session, follow=True))
        await _pause(field, 0.5, 2.0)
    except OSError as error:
        raise Missed(str(error)) from error
    finally:
        for connection in connections:
            connection.transport.abort()
    return f"{len(connections)} connections"


async def jump_clock(field: Field) -> str:
    """Set the service's clock an hour ahead, or back, for a while."""
    seconds = field.random.choice((3_600, -3_600, 5, -5))
    field.ground.service.set_clock(seconds)
    try:
        await _pause(field, 0.5, 2.0)
    finally:
        field.ground.service.set_clock(0)
    return f"{seconds} s"


async def exhaust_connections(field: Field) -> str:
    """End all of the service's connections to PostgreSQL, and take every one that there may be, for a moment."""
    taken: list[psycopg.AsyncConnection[Any]] = []
    url = field.ground.postgres.url
    try:
        taken.append(await psycopg.AsyncConnection.connect(url, autocommit=True))
        await taken[0].execute(_END_SERVICE)
        with suppress(psycopg.OperationalError):  # there is none left
            while True:
                taken.append(await psycopg.AsyncConnection.connect(url))
        await _pause(field, 0.5, 1.5)
    finally:
        for connection in taken:
            await connection.close()
    return f"{len(taken)} taken"


async def fill_disk(field: Field) -> str:
    """Fill PostgreSQL's file system for a moment; should PostgreSQL give up, start it again."""
    disk = field.ground.postgres.disk
    if disk is None:
        raise Missed("there is no file system of its own")
    filler = disk / "filler"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:  # there is no space left
            while True:
                file.write(bytes(1 << 20))
        await _pause(field, 0.5, 2.0)
    finally:
        size = filler.stat().st_size
        filler.unlink()
    await field.ground.postgres.start_if_stopped()
    return f"{size >> 20} MB"


async def hold_row(field: Field) -> str:
    """Lock a session's row for 2 s, as somebody with a psql may."""
    session = field.random.choice(field.sessions)
    async with await psycopg.AsyncConnection.connect(field.ground.postgres.url) as connection:
        await connection.execute("SELECT FROM collab_sessions WHERE id = %s FOR UPDATE", [session])
        await asyncio.sleep(2.0)
        await connection.rollback()
    return f"of session {session}"


SERVICE = (kill_worker, kill_workers, kill_parent, stop_service, freeze_worker)
DATABASE = (
    stop_postgres_fast, stop_postgres_immediately, kill_postgres, terminate_backends, freeze_backend,
    lose_commit, lose_statement, delay_statement, exhaust_connections, fill_disk,
)  # fmt: skip
CLIENTS = (cut_clients, lose_answer, delay_answers, half_close, throttle_clients, send_garbage, stall_readers)
ROWS = (hold_row, jump_clock)
_PLACES: Sequence[Sequence[Make]] = (SERVICE, DATABASE, CLIENTS, ROWS)
"""In each place there is one fault at a time; several places may have one at once."""


class Faults:
    """Faults at random moments, of every kind in turn."""

    def __init__(self, field: Field, history: History) -> None:
        """Prepare; `run` makes them."""
        self._field = field
        self._history = history
        self._busy = [asyncio.Lock() for _ in _PLACES]
        self._left: list[tuple[int, Make]] = []

    async def run(self, seconds: float) -> None:
        """Make faults for a while, and return when they have healed."""
        deadline = self._history.now() + seconds
        async with asyncio.TaskGroup() as tasks:
            while (left := deadline - self._history.now()) > 0:
                await asyncio.sleep(min(left, self._field.random.uniform(0.1, 0.8)))
                chosen = self._next()
                if chosen is not None:
                    tasks.create_task(self._make(*chosen), name=f"fault-{chosen[1].__name__}")

    def _next(self) -> tuple[int, Make] | None:
        """Take the next kind whose place has no fault now."""
        if not self._left:
            self._left = [(place, make) for place, makes in enumerate(_PLACES) for make in makes]
            self._field.random.shuffle(self._left)
        for at, (place, _) in enumerate(self._left):
            if not self._busy[place].locked():
                return self._left.pop(at)
        return None

    async def _make(self, place: int, make: Make) -> None:
        async with self._busy[place]:
            fault = Fault(make.__name__, self._history.now())
            self._history.entries.append(fault)
            try:
                fault.note = await make(self._field)
                fault.hit = True
            except Missed as error:
                fault.note = str(error)
            except (psycopg.Error, ProcessLookupError) as error:  # another fault was there first
                fault.note = f"{type(error).__name__}: {error}".partition("\n")[0]
            fault.ended = self._history.now()


async def healed(ground: Ground) -> None:
    """Wait until everything is there again."""
    ground.wire.heal()
    ground.clients.accept()
    ground.clients.release()

    async def all_run() -> bool:
        return len(ground.service.workers) == WORKERS

    await until(all_run, "the return of the workers", _HEALING)


def _workers(field: Field) -> Sequence[int]:
    workers = field.ground.service.workers
    if not workers:
        raise Missed("no worker runs")
    return workers


async def _clients(field: Field) -> ClientWire:
    """Wait until clients are connected: another fault may just have cut them."""
    await _soon(field.ground.clients.is_connected, "no client is connected")
    return field.ground.clients


async def _soon(holds: Callable[[], bool], otherwise: str, seconds: float = 1.5) -> None:
    """Wait for a moment that may not come."""

    async def has_come() -> bool:
        return holds()

    try:
        await until(has_come, otherwise, seconds)
    except AssertionError as error:
        raise Missed(otherwise) from error


async def _serves(field: Field) -> None:
    """Wait until the service accepts connections."""
    host, _, port = field.ground.service.address.rpartition(":")

    async def accepts() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(accepts, "a connection", 5.0)
    except AssertionError as error:
        raise Missed("the service is away") from error


async def _frozen(field: Field, pid: int, least: float, most: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await _pause(field, least, most)
    finally:
        with suppress(ProcessLookupError):
            if is_running(pid):
                os.kill(pid, signal.SIGCONT)


async def _cut_once(field: Field, word: bytes, *, from_server: bool) -> str:
    wire = field.ground.wire
    before = wire.cuts
    (wire.cut_before_server_says if from_server else wire.cut_before_client_says)(word)
    try:
        await _soon(lambda: wire.cuts > before, "nothing of the kind was said")
    finally:
        wire.heal()
    return word.decode(errors="replace").strip("\0")
