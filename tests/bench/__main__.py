"""`make bench`: figures with floors, each as a ratio to a reference measured beside it in the same run."""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psycopg

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory
from collab_service.storage.embedded.accounts import postgres_account
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.bench import growth, live, load, overload, postgres, streams, web
from tests.bench.echo import serving_echo
from tests.bench.percentiles import REPEATS, medians_in_turn
from tests.bench.report import Report, machine
from tests.bench.servers import serving
from tests.bench.writers import write
from tests.memory import most_resident_kilobytes, resident_kilobytes
from tests.processes import GatewayProcess, ServeProcess

ECHO_FLOOR, NAIVE_FLOOR, MANY_SESSIONS_FLOOR = 0.75, 6.0, 0.95
MANY_SESSIONS_REPEATS = 9
APPENDER_FLOOR = 3.0
BATCH_FLOOR = 0.6
BATCH_CLIENTS = 16
SLOW_DISK_FLOOR = 1_400
"""Appends a second, with commits that take 20 ms."""
READ_FLOOR = 0.4
EVENTS = 1_000_000
READ_MEMORY_FLOOR_MB = 50
OLD_SNAPSHOT_FLOOR = 0.8
RATE = 200
"""Events a second of a session that people write together, in the figures of live follows."""
DELIVERY_FLOORS = {"same server": (2.0, 5.0), "another server": (6.0, 20.0)}
"""p50 and p99 in milliseconds."""
MANY, MANY_P99_FLOOR = 100, 20.0
CROWD, CROWD_RATE, CROWD_P99_FLOOR = 1_000, 50, 250.0
IDLE, IDLE_CONNECTIONS, IDLE_KB_FLOOR = 2_000, 20, 35.0
PAUSED_MB_FLOOR = 20
WEB_FLOOR, WEB_EVENTS = 0.5, 200_000
MEMORY_FLOOR_MB = 200
OVERLOAD_FLOOR, OVERLOAD_AFTER_FLOOR, OVERLOAD_MB_FLOOR = 0.7, 0.85, 400


class Bench:
    """Servers on one database, and where what is found is told."""

    def __init__(self, cluster: Cluster, servers: list[ServeProcess], directory: Path, report: Report) -> None:
        self.cluster = cluster
        self.directory = directory
        self.report = report
        self.servers = servers
        self.address = servers[0].grpc_address
        self.all_addresses = [server.grpc_address for server in servers]
        self.pid = servers[0].process.pid

    def new_session(self) -> int:
        """Create a session."""
        with grpc.insecure_channel(self.address) as channel:
            return CollabServiceStub(channel).CreateSession(pb.CreateSessionRequest()).session.id

    def fill(self, session: int, count: int) -> None:
        """Append so many thousand events to a session."""
        batch = [pb.NewEvent(actor_id="ada", type="edit", json=load.PAYLOAD)] * 1000
        with grpc.insecure_channel(self.address) as channel:
            stub = CollabServiceStub(channel)
            for _ in range(count // 1000):
                stub.AppendEvents(pb.AppendEventsRequest(session_id=session, events=batch))

    def tell_rate(self, what: str, rate: float, *, reference: float | None = None, floor: float | None = None) -> None:
        """Tell events a second, as a ratio to a reference, which has a floor."""
        ratio = None if reference is None else rate / reference
        holds = None if ratio is None or floor is None else ratio >= floor
        self.report.tell(what, f"{rate:,.0f}/s", "" if floor is None else f">= {floor:g}", holds, ratio=ratio)

    def unary(self) -> None:
        """64 unary writers, against an echo and against pgbench with the naive transaction."""
        self.report.section(f"64 unary writers on one session, 200-byte payloads, medians of {REPEATS} runs in turn")
        load.append_rate(self.all_addresses, self.new_session(), 3)  # warm
        with serving_echo() as echo:
            naive, echoed, one, every, lone = medians_in_turn(
                lambda: postgres.append_rate(self.cluster, self.new_session(), clients=load.WRITERS, seconds=6),
                lambda: load.append_rate([echo], 1, 6),
                lambda: load.append_rate([self.address], self.new_session(), 6),
                lambda: load.append_rate(self.all_addresses, self.new_session(), 6),
                lambda: load.append_rate([self.address], self.new_session(), 3, writers=1),
            )
            python_echoed, python_one = medians_in_turn(
                lambda: load.grpc_append_rate(echo, 1, 4),
                lambda: load.grpc_append_rate(self.address, self.new_session(), 4),
            )
        few, many = medians_in_turn(  # nearly equal: one of nine is easier to tell from noise than one of three
            lambda: write(self.address, [self.new_session()], writers=64, seconds=2).rate,
            lambda: write(self.address, [self.new_session() for _ in range(64)], writers=64, seconds=2).rate,
            repeats=MANY_SESSIONS_REPEATS,
        )
        self.tell_rate("pgbench, a transaction an event", naive)
        self.tell_rate("a grpc.aio echo that stores nothing, one process", echoed)
        self.tell_rate("AppendEvent, one server process / echo", one, reference=echoed)
        servers = f"a server process a core ({len(self.servers)})"
        self.tell_rate(f"AppendEvent, {servers} / echo", every, reference=echoed, floor=ECHO_FLOOR)
        self.tell_rate("AppendEvent, one server process / pgbench", one, reference=naive)
        self.tell_rate(f"AppendEvent, {servers} / pgbench", every, reference=naive, floor=NAIVE_FLOOR)
        self.tell_rate("AppendEvent, a single writer", lone)
        self.tell_rate("the echo, load by a grpc.aio client", python_echoed)
        self.tell_rate("AppendEvent, the same load, one server process / echo", python_one, reference=python_echoed)
        self.tell_rate(
            f"64 sessions / one session, medians of {MANY_SESSIONS_REPEATS}",
            many,
            reference=few,
            floor=MANY_SESSIONS_FLOOR,
        )

    def stream(self) -> None:
        """64 coroutines through the client's appender, against unary calls of the same client to an echo."""
        self.report.section(f"64 coroutines through one appender, one session, medians of {REPEATS} runs in turn")
        found: list[streams.Rate] = []

        def appender() -> float:
            found.append(streams.appender_rate(self.address, self.new_session(), coroutines=64, seconds=5))
            return found[-1].events

        with serving_echo() as echo:
            echoed, appended, thousand = medians_in_turn(
                lambda: load.grpc_append_rate(echo, 1, 4),
                appender,
                lambda: streams.appender_rate(self.address, self.new_session(), coroutines=1_000, seconds=4).events,
            )
        p50, p99 = (statistics.median(values) for values in list(zip(*found, strict=True))[1:])
        self.tell_rate("unary calls of a grpc.aio client to an echo", echoed)
        self.tell_rate("appender / unary echo", appended, reference=echoed, floor=APPENDER_FLOOR)
        self.report.tell("acknowledgement, p50 / p99", in_ms(p50, p99))
        self.tell_rate("1,000 coroutines", thousand)

    def batches(self) -> None:
        """Batches of 100, against pgbench with rows by the hundred."""
        self.report.section(
            f"Batches of 100, one key each, {BATCH_CLIENTS} callers on one session, medians of {REPEATS} runs in turn"
        )
        rows, batches = medians_in_turn(
            lambda: postgres.append_rate(
                self.cluster, self.new_session(), clients=BATCH_CLIENTS, events=streams.BATCH, seconds=5
            ) * streams.BATCH,
            lambda: streams.batch_rate(self.address, self.new_session(), seconds=5),
        )  # fmt: skip
        self.tell_rate("pgbench, 100 rows an insert, events", rows)
        self.tell_rate("AppendEvents / pgbench, events", batches, reference=rows, floor=BATCH_FLOOR)

    def slow_disk(self) -> None:
        """64 writers where every commit takes 20 ms."""
        self.report.section("A disk on which every commit takes 20 ms (commit_delay), 64 writers on one session")
        with psycopg.connect(self.cluster.url, autocommit=True) as admin:
            for setting in ("commit_delay = 20000", "commit_siblings = 0"):
                admin.execute(f"ALTER SYSTEM SET {setting}")
            admin.execute("SELECT pg_reload_conf()")
            try:
                naive, one = medians_in_turn(
                    lambda: postgres.append_rate(self.cluster, self.new_session(), clients=load.WRITERS, seconds=4),
                    lambda: load.append_rate([self.address], self.new_session(), 4),
                )
            finally:
                for setting in ("commit_delay", "commit_siblings"):
                    admin.execute(f"ALTER SYSTEM RESET {setting}")
                admin.execute("SELECT pg_reload_conf()")
        self.tell_rate("pgbench, a transaction an event", naive)
        self.report.tell("AppendEvent, one server process", f"{one:,.0f}/s", f">= {SLOW_DISK_FLOOR:,}/s",
                         one >= SLOW_DISK_FLOOR)  # fmt: skip

    def reading(self) -> None:
        """A million events read back, and the server's memory meanwhile."""
        self.report.section(f"Catching up on {EVENTS:,} events with ListEvents, medians of {REPEATS} runs in turn")
        session = self.new_session()
        self.fill(session, EVENTS)
        with growing_memory(self.pid) as grown:
            copied, drained, decoded = medians_in_turn(
                lambda: postgres.copy_rate(self.cluster.url, session, EVENTS),
                lambda: streams.drain_rate(self.address, session, EVENTS),
                lambda: streams.read_rate(self.address, session, EVENTS),
            )
        self.tell_rate("PostgreSQL's COPY of the rows", copied)
        self.tell_rate("a client that does not decode / COPY", drained, reference=copied, floor=READ_FLOOR)
        self.tell_rate("the Python client, decoded", decoded)
        self.report.tell("the server's resident memory grew by", f"{grown():.1f} MB", f"<= {READ_MEMORY_FLOOR_MB} MB",
                         grown() <= READ_MEMORY_FLOOR_MB)  # fmt: skip

    def old_snapshot(self) -> None:
        """The append rate with another transaction open for a minute."""
        self.report.section("64 writers on one session while another transaction stays open for a minute")
        session = self.new_session()
        with psycopg.connect(self.cluster.url) as other:
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            other.execute("SELECT count(*) FROM collab_sessions")
            first = load.append_rate([self.address], session, 10)
            load.append_rate([self.address], session, 40)
            last = load.append_rate([self.address], session, 10)
        self.tell_rate("in the first ten seconds", first)
        self.tell_rate("in the last ten seconds / in the first", last, reference=first, floor=OLD_SNAPSHOT_FLOOR)

    def live(self) -> None:
        """How soon events arrive at followers, and what followers cost."""
        self.report.section(
            f"Following a session at {RATE} events/s, from the call of AppendEvent to delivery, p50 / p99, "
            f"medians of {REPEATS} runs in turn"
        )
        first, last = self.all_addresses[0], self.all_addresses[-1]

        def delivery(follower: str, followers: int, rate: int) -> Callable[[], live.Delays]:
            return lambda: live.delivery(first, follower, self.new_session(), followers=followers, rate=rate, seconds=5)

        with serving_echo() as echo:
            runs: dict[str, Callable[[], live.Delays]] = {
                "echo": lambda: live.echo(echo, RATE, 5),
                "same server": delivery(first, 1, RATE),
                "another server": delivery(last, 1, RATE),
                "many": delivery(first, MANY, RATE),
                "crowd": delivery(first, CROWD, CROWD_RATE),
            }
            found = [{what: run() for what, run in runs.items()} for _ in range(REPEATS)]
        p50 = {what: statistics.median(one[what].p50 for one in found) for what in runs}
        p99 = {what: statistics.median(one[what].p99 for one in found) for what in runs}
        self.report.tell("a grpc.aio echo that stores nothing", in_ms(p50["echo"], p99["echo"]))
        for where, (floor_50, floor_99) in DELIVERY_FLOORS.items():
            if where == "another server" and first == last:
                continue
            self.report.tell(
                f"1 follower, {where}", in_ms(p50[where], p99[where]), f"<= {floor_50:g} / {floor_99:g}",
                p50[where] <= floor_50 and p99[where] <= floor_99,
            )  # fmt: skip
        for what, followers, rate, floor in (
            ("many", MANY, RATE, MANY_P99_FLOOR),
            ("crowd", CROWD, CROWD_RATE, CROWD_P99_FLOOR),
        ):
            self.report.tell(
                f"{followers:,} followers at {rate} events/s, {followers * rate:,} deliveries/s",
                in_ms(p50[what], p99[what]), f"<= - / {floor:g}", p99[what] <= floor,
            )  # fmt: skip
        each = live.idle_followers(first, self.new_session(), self.pid, followers=IDLE, connections=IDLE_CONNECTIONS)
        self.report.tell(
            f"{IDLE:,} idle followers on {IDLE_CONNECTIONS} connections, memory of each", f"{each:.1f} kB",
            f"<= {IDLE_KB_FLOOR:g} kB", each <= IDLE_KB_FLOOR,
        )  # fmt: skip
        paused_rate, grown = live.paused_follower(first, self.new_session(), self.pid, seconds=60)
        self.tell_rate("64 writers for a minute with a paused follower", paused_rate)
        self.report.tell(
            "the server's resident memory grew by", f"{grown / 1024:.1f} MB", f"<= {PAUSED_MB_FLOOR} MB",
            grown <= PAUSED_MB_FLOOR * 1024,
        )  # fmt: skip

    def web(self) -> None:
        """The JSON gateway as a process of its own, beside the same through gRPC."""
        self.report.section(
            f"Through a gateway of its own, {web.CONNECTIONS} connections, medians of {REPEATS} runs in turn"
        )
        delays = []
        with GatewayProcess(self.address, cwd=self.directory) as gateway:
            address = gateway.http_address
            web.append_rate(address, self.new_session(), 3)  # warm
            session = self.new_session()
            self.fill(session, WEB_EVENTS)
            over_grpc, over_http, listed = medians_in_turn(
                lambda: load.append_rate([self.address], self.new_session(), 8),
                lambda: web.append_rate(address, self.new_session(), 8),
                lambda: web.listing_rate(address, session, WEB_EVENTS),
            )
            for _ in range(REPEATS):
                delays.append(web.delivery(address, self.new_session(), rate=RATE, seconds=5))
        self.tell_rate("AppendEvent over gRPC", over_grpc)
        self.tell_rate("POST /api/collab/events / gRPC", over_http, reference=over_grpc, floor=WEB_FLOOR)
        self.tell_rate(f"GET {WEB_EVENTS:,} events as lines of JSON", listed)
        p50, p99 = (statistics.median(values) for values in zip(*delays, strict=True))
        self.report.tell(f"from POST to server-sent event, {RATE} events/s, p50 / p99", in_ms(p50, p99))

    def overload(self) -> None:
        """A hundred times as many callers as keep a server busy, each of which comes back as soon as it may."""
        self.report.section(
            f"Batches of {overload.BATCH} from {overload.MANY:,} callers instead of {overload.FEW}, on one session, "
            f"medians of {REPEATS} runs in turn"
        )
        refused: list[overload.Outcome] = []
        with serving(self.cluster, self.directory, "overload") as server:

            def few() -> float:
                return overload.run(server.address, session, callers=overload.FEW, seconds=4).stored

            def many() -> float:
                refused.append(overload.run(server.address, session, callers=overload.MANY, seconds=8))
                return refused[-1].stored

            [session] = server.new_sessions(1)
            before, under, after = medians_in_turn(few, many, few)
            most = most_resident_kilobytes(server.pid) / 1024
        self.tell_rate(f"{overload.FEW} callers, events", before)
        self.tell_rate(f"{overload.MANY:,} callers / {overload.FEW}", under, reference=before, floor=OVERLOAD_FLOOR)
        self.tell_rate("afterwards / before", after, reference=before, floor=OVERLOAD_AFTER_FLOOR)
        rate, delay = (statistics.median(values) for values in list(zip(*refused, strict=True))[1:])
        self.report.tell("refused meanwhile, and within (p99)", f"{rate:,.0f}/s, {delay:.0f} ms")
        self.report.tell("the server's resident memory, at most", f"{most:.0f} MB", f"<= {OVERLOAD_MB_FLOOR} MB",
                         most <= OVERLOAD_MB_FLOOR)  # fmt: skip

    def memory(self) -> None:
        """What the servers have needed for all of it."""
        self.report.section("Memory")
        most = max(most_resident_kilobytes(server.process.pid) for server in self.servers) / 1024
        self.report.tell("a server process, at most, under all of the above", f"{most:.0f} MB",
                         f"<= {MEMORY_FLOOR_MB} MB", most <= MEMORY_FLOOR_MB)  # fmt: skip


def in_ms(p50: float, p99: float) -> str:
    """Return two delays as text."""
    return f"{p50:.2f} / {p99:.2f} ms"


@contextmanager
def growing_memory(pid: int) -> Iterator[Callable[[], float]]:
    """Watch a process's resident memory; yield what tells by how many MB it has grown at most."""
    before = most = resident_kilobytes(pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, resident_kilobytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: (most - before) / 1024
    finally:
        done.set()
        watcher.join()


@contextmanager
def running_cluster() -> Iterator[tuple[Cluster, Path]]:
    """Start a PostgreSQL; yield it with a directory for other processes."""
    directory = Path(tempfile.mkdtemp(prefix="collab-bench-"))
    directory.chmod(0o711)
    account = postgres_account()
    if account is None:
        raise SystemExit("PostgreSQL needs a user other than root, such as nobody")
    data = DataDirectory(directory / "data", account)
    cluster = Cluster(data)
    try:
        cluster.start("max_connections=200")
        schema.migrate(cluster.url)
        yield cluster, directory
    finally:
        cluster.stop()
        data.release()
        shutil.rmtree(directory)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "unary": Bench.unary,
    "stream": Bench.stream,
    "batches": Bench.batches,
    "slow_disk": Bench.slow_disk,
    "reading": Bench.reading,
    "old_snapshot": Bench.old_snapshot,
    "live": Bench.live,
    "web": Bench.web,
    "memory": Bench.memory,
    "overload": Bench.overload,
}


def main() -> int:
    """Run the benchmarks; return 1 when one is below its floor."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("only", nargs="*", choices=[*SECTIONS, "growth", []], help="which ones")
    parser.add_argument("--large", action="store_true", help="let growth go on to 10,000,000 events")
    parser.add_argument("--results", type=Path, default=Path("bench-results"), help="where to write what was found")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    with running_cluster() as (cluster, directory):
        report = Report(machine(cluster), datetime.now(UTC))
        try:
            chosen = [name for name in SECTIONS if not options.only or name in options.only]
            if chosen:
                with ExitStack() as stack:
                    servers = [
                        stack.enter_context(ServeProcess("--database-url", cluster.url, cwd=directory))
                        for _ in range(os.cpu_count() or 1)
                    ]
                    bench = Bench(cluster, servers, directory, report)
                    for name in chosen:
                        SECTIONS[name](bench)
            if not options.only or "growth" in options.only:
                growth.run(cluster, directory, report, large=options.large)
        finally:
            report.write(options.results)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
