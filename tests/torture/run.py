"""A run: everybody writes and reads while faults are made; then all heals, and what came of it is checked."""

import argparse
import asyncio
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psycopg
from msgspec import Struct, field

from collab_service.client import CollabClient, Event, SessionNotFound
from tests.torture.checker import Log, Violation, unlike, violations
from tests.torture.faults import Faults, Field, healed
from tests.torture.ground import Ground, ground
from tests.torture.history import Fault, History, Page
from tests.torture.readers import Followers, read_now_and_then
from tests.torture.writers import Appending, Calling, Deleting, Sessions, Streaming, Unary, Writer
from tests.waiting import until

SESSIONS = 4
ROUND = 60.0
"""Seconds of a round at most: each has sessions and a history of its own, which keeps the memory bounded."""
_CONNECTIONS = 6
"""Connections through which the log is read in the end; the kernel spreads them over the workers."""
_FINISHING = 90.0
"""Seconds for those who write, and then for those who follow, to come to the end once everything has healed."""
_LOOKS = 40
"""Looks, all the same, after which nothing is written any more."""
_SHOWN = 12
"""Violations, and entries of the history for each, that are printed."""

_LOG = """
SELECT id, session_id, server_seq, created_at, chain_hash, payload_json, payload_binary,
    actor_id, client_seq, type, hash, coalesce(signature, ''), idempotency_key
FROM collab_events WHERE session_id = %s ORDER BY server_seq
"""
_IS_LIVE = "SELECT FROM collab_sessions WHERE id = %s AND deleted_at IS NULL"
_AT_WORK = """
SELECT (SELECT count(*) FROM collab_events),
    (SELECT count(*) FROM pg_stat_activity
     WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle')
"""


_RUNS = re.compile("x{10,}")
"""What payloads are filled up with."""

W = TypeVar("W", bound=Writer)


class Totals(Struct):
    """What came of all rounds, for a document."""

    seeds: Sequence[int]
    seconds: float = 0.0
    """In which faults were made, or were healing."""
    faults: Counter[str] = field(default_factory=Counter)
    """By kind, without those that found nothing to damage."""
    faults_missed: int = 0
    """Those that found nothing."""
    calls: Counter[str] = field(default_factory=Counter)
    """Appends by outcome."""
    events_stored: int = 0
    events_read: int = 0
    """By readers and followers, while faults were made."""
    violations: Counter[str] = field(default_factory=Counter)
    """By kind; `lost` are acknowledged events that are not there."""

    def add(self, result: "Result") -> None:
        """Count a round."""
        self.seconds += result.history.now()
        self.faults += result.faults
        self.faults_missed += result.faults_missed
        self.calls += result.outcomes
        self.events_stored += result.events
        self.events_read += result.events_read
        self.violations += Counter(violation.kind for violation in result.found)

    def text(self) -> str:
        """Say it in a few lines."""
        return "\n".join(
            (
                f"{self.seconds / 60:.1f} minutes, seeds {self.seeds[0]} to {self.seeds[-1]}",
                f"faults survived: {self.faults.total()} ({_counted(self.faults)}); "
                f"{self.faults_missed} more found nothing to damage",
                f"calls checked: {self.calls.total()} ({_counted(self.calls)})",
                f"events stored: {self.events_stored}; read meanwhile by readers and followers: {self.events_read}",
                f"events lost: {self.violations['lost']}; promises not kept: {self.violations.total()}",
            )
        )


class Result(Struct):
    """What came of a round."""

    history: History
    found: Sequence[Violation]
    oddities: Sequence[str]
    events: int
    """Events stored in the end, in all sessions that were not deleted."""

    @property
    def faults(self) -> Counter[str]:
        """How many of each kind have damaged something."""
        return Counter(fault.kind for fault in self._faults if fault.hit)

    @property
    def faults_missed(self) -> int:
        """How many found nothing to damage."""
        return sum(not fault.hit for fault in self._faults)

    @property
    def _faults(self) -> Sequence[Fault]:
        return [entry for entry in self.history.entries if isinstance(entry, Fault)]

    @property
    def outcomes(self) -> Counter[str]:
        """How many appends had each outcome."""
        return Counter(call.outcome for call in self.history.appends())

    @property
    def events_read(self) -> int:
        """How many events readers and followers were sent."""
        return sum(len(entry.events) for entry in self.history.entries if isinstance(entry, Page))

    def text(self) -> str:
        """Say it in a few lines."""
        reasons = Counter(call.reason for call in self.history.appends() if call.reason)
        lines = [
            f"seed {self.history.seed}: {self.history.now():.0f} s, {self.outcomes.total()} appends "
            f"({_counted(self.outcomes)}), {self.events} events stored, {self.events_read} read",
            f"  faults: {_counted(self.faults)}",
            f"  reasons: {_counted(reasons)}",
        ]
        lines += [f"  the log of the service has: {oddity}" for oddity in self.oddities]
        lines.append(f"  violations: {len(self.found)}")
        return "\n".join(lines)

    def failure(self, directory: Path) -> str:
        """Say what was violated, with the calls that matter."""
        lines = [f"seed {self.history.seed} has found violations; the whole history is in {directory}"]
        for violation in self.found[:_SHOWN]:
            lines.append(f"* {violation.kind}, session {violation.session}: {violation.text}")
            concerned = [entry for entry in self.history.entries if violation.matters(entry)]
            lines += [f"    {_RUNS.sub(_shortened, str(entry))}"[:1000] for entry in concerned[-_SHOWN:]]
        return "\n".join(lines)


async def play(place: Ground, history: History, seconds: float) -> Result:
    """Make one round.

    Args:
        place: Where.
        history: An empty one, with the seed of all chances. That repeats what is done, as far as the machine's own
            timing lets it.
        seconds: How long faults are made.
    """
    seed = history.seed
    direct, wired = place.service.address, place.clients.address
    async with CollabClient(direct) as client:
        sessions = Sessions([(await client.create_session()).session.id for _ in range(SESSIONS)])
    stop = asyncio.Event()
    faults = Faults(Field(place, random.Random(f"{seed}/faults"), sessions.live), history)
    async with asyncio.TaskGroup() as following:
        followers = Followers(history, following, direct, wired)
        for session in sessions.live:
            followers.watch(session)
        sessions.on_new = followers.watch
        async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as tasks:
            for name, work in _work(history, sessions, stop, direct, wired):
                tasks.create_task(work, name=name)
            await faults.run(seconds)
            patience.reschedule(asyncio.get_running_loop().time() + _FINISHING)
            await healed(place)
            stop.set()
        await _quiet(place)
        logs = {session: await _log(place, session) for session in sessions.all}
        await followers.finish({session: len(log) for session, log in logs.items() if log is not None}, _FINISHING)
    found = violations(history, logs)
    for number in range(_CONNECTIONS):
        found += await _read_through(direct, f"connection {number}", logs)
    return Result(history, found, place.service.oddities(), sum(len(log or ()) for log in logs.values()))


def _work(
    history: History, sessions: Sessions, stop: asyncio.Event, direct: str, wired: str
) -> Sequence[tuple[str, Coroutine[Any, Any, None]]]:
    """Return what everybody does until told to stop, with their names."""

    def named(kind: type[W], name: str) -> W:
        return kind(name, history, sessions, stop)

    return [
        ("unary-1", named(Unary, "unary-1").run([direct, wired], batches=False)),
        ("unary-2", named(Unary, "unary-2").run([direct, direct], batches=False)),
        ("unary-3", named(Unary, "unary-3").run([wired, direct], batches=False)),
        ("batch-1", named(Unary, "batch-1").run([direct, wired], batches=True)),
        ("batch-2", named(Unary, "batch-2").run([direct, direct], batches=True)),
        ("stream-1", named(Streaming, "stream-1").run(direct)),
        ("stream-2", named(Streaming, "stream-2").run(wired)),
        ("client-1", named(Calling, "client-1").run(direct)),
        ("client-2", named(Calling, "client-2").run(wired)),
        ("appender-1", named(Appending, "appender-1").run(direct)),
        ("appender-2", named(Appending, "appender-2").run(wired)),
        ("deleting", named(Deleting, "deleting").run(direct)),
        ("reader", read_now_and_then(direct, history, sessions, stop)),
    ]


async def _quiet(place: Ground) -> None:
    """Wait until nothing is written any more, be it what nobody waits for."""
    seen: list[tuple[int, int]] = []
    async with await psycopg.AsyncConnection.connect(place.postgres.url, autocommit=True) as connection:

        async def nothing_moves() -> bool:
            row = await (await connection.execute(_AT_WORK)).fetchone()
            assert row is not None
            seen.append((row[0], row[1]))
            return len(seen) > _LOOKS and set(seen[-_LOOKS:]) == {(row[0], 0)}

        await until(nothing_moves, "quiet", _FINISHING)


async def _log(place: Ground, session: int) -> Log | None:
    """Read a session from the table; None when it is deleted."""
    async with await psycopg.AsyncConnection.connect(place.postgres.url) as connection:
        if await (await connection.execute(_IS_LIVE, [session])).fetchone() is None:
            return None
        rows = await (await connection.execute(_LOG, [session])).fetchall()
    return [_event(*row) for row in rows]


def _event(
    id_: int,
    session: int,
    number: int,
    created_at: datetime,
    chain_hash: bytes,
    text: str | None,
    binary: bytes,
    *rest: Any,
) -> Event:
    payload = binary if text is None else text
    return Event(id_, session, number, created_at.astimezone(UTC), chain_hash, payload, *rest)


async def _read_through(address: str, source: str, logs: dict[int, Log | None]) -> list[Violation]:
    """Read all sessions through a connection of its own, and compare."""
    found: list[Violation] = []
    async with CollabClient(address, options=[("grpc.use_local_subchannel_pool", 1)]) as client:
        for session, log in logs.items():
            seen: Log | None
            try:
                seen = [event async for event in client.read(session)]
            except SessionNotFound:
                seen = None
            found += unlike(session, source, seen, log)
    return found


def _shortened(run: re.Match[str]) -> str:
    return f"{len(run[0])} x"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counter.items())) or "none"


async def torture(seeds: Sequence[int], seconds: float) -> AsyncGenerator[Result, None]:
    """Make a round for each seed, one after the other, on one ground."""
    async with ground() as place:
        for seed in seeds:
            history = History(seed)
            try:
                yield await play(place, history, seconds)
            except BaseException:
                print(f"seed {seed} was broken off; its history is in {_kept(history)}", file=sys.stderr)
                raise


def keep(result: Result) -> str:
    """Keep the history of a round that has found violations, and return what to tell of it."""
    directory = _kept(result.history)
    text = result.failure(directory)
    (directory / "violations.txt").write_text(text)
    return text


def _kept(history: History) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=f"collab-torture-seed-{history.seed}-"))
    history.write(directory / "history.jsonl")
    return directory


def main() -> int:
    """Run for some minutes; return 1 when a promise was not kept."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are made")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the others count up")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="where to write the totals as JSON")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    seconds = 60 * options.minutes
    rounds = max(1, round(seconds / ROUND))
    totals = Totals(list(range(seed, seed + rounds)))

    async def run() -> None:
        async with aclosing(torture(totals.seeds, seconds / rounds)) as results:
            async for result in results:
                print(result.text(), flush=True)
                totals.add(result)
                if result.found:
                    print(keep(result), file=sys.stderr)

    asyncio.run(run())
    print(totals.text())
    if options.output is not None:
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(totals)) + b"\n")
    return int(bool(totals.violations))
