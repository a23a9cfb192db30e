"""`make bench`: figures with floors, each as a ratio to a reference measured beside it in the same run."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import psycopg

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster, DataDirectory
from collab_service.storage.embedded.accounts import postgres_account
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.bench import live, load, web
from tests.processes import GatewayProcess, ServeProcess

REPEATS = 3
UNARY_FLOOR = 5.0
MEMORY_FLOOR_MB = 50
OLD_SNAPSHOT_FLOOR = 0.8
EVENTS = 1_000_000
RATE = 200
"""Events a second of a session that people write together, in the figures of live follows."""
DELIVERY_FLOORS = {"same server": (3.0, 10.0), "another server": (6.0, 20.0)}
"""p50 and p99 in milliseconds."""
MANY = 100
MANY_P99_FLOOR = 20.0
IDLE, IDLE_CONNECTIONS = 2_000, 20
IDLE_KB_FLOOR = 35.0
PAUSED_MB_FLOOR = 20
WEB_FLOOR = 0.5
WEB_EVENTS = 200_000


class Bench:
    """Servers on one database, and what was found below its floor."""

    def __init__(self, cluster: Cluster, servers: list[ServeProcess], directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.server = servers[0]
        self.address = self.server.grpc_address
        self.all_addresses = [server.grpc_address for server in servers]
        self.failed = False

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

    def tell(self, what: str, figure: str, floor: str, holds: bool) -> None:
        """Print a figure beside its floor."""
        self.failed |= not holds
        print(f"  {what:<58} {figure:>16}   {floor:<12} {'ok' if holds else 'BELOW ITS FLOOR'}", flush=True)

    def unary(self) -> None:
        """64 unary writers on one session, against pgbench with the naive transaction."""
        print(f"64 writers on one session, 200-byte payloads, medians of {REPEATS} runs in turn:")
        servers = len(self.all_addresses)
        naive, one, every, lone = [], [], [], []
        load.append_rate(self.all_addresses, self.new_session(), 3)  # warm
        for _ in range(REPEATS):
            naive.append(load.naive_rate(self.cluster, self.cluster.url, self.new_session(), 8))
            one.append(load.append_rate([self.address], self.new_session(), 8))
            every.append(load.append_rate(self.all_addresses, self.new_session(), 8))
            lone.append(load.append_rate([self.address], self.new_session(), 3, writers=1))
        for what, rates in (
            ("pgbench, a transaction an event", naive),
            ("AppendEvent, one server process", one),
            (f"AppendEvent, a server process a core ({servers})", every),
            ("AppendEvent, a single writer", lone),
        ):
            print(f"  {what:<58} {statistics.median(rates):>14,.0f}/s   {spread(rates)}")
        reference = statistics.median(naive)
        print(f"  {'one server process / pgbench':<58} {statistics.median(one) / reference:>16.2f}")
        ratio = statistics.median(every) / reference
        self.tell("a server process a core / pgbench", f"{ratio:.2f}", f">= {UNARY_FLOOR}", ratio >= UNARY_FLOOR)

    def reading(self) -> None:
        """A million events read back, and the server's memory meanwhile."""
        print(f"\n{EVENTS:,} events read back with ListEvents:")
        session = self.new_session()
        self.fill(session, EVENTS)
        count, seconds, grown = load.read_all(self.address, session, self.server.process.pid)
        print(f"  {'events per second, decoded by a Python client':<58} {count / seconds:>14,.0f}/s")
        whole = count == EVENTS
        self.tell("the server's resident memory grew by", f"{grown / 1024:.1f} MB", f"<= {MEMORY_FLOOR_MB} MB",
                  whole and grown <= MEMORY_FLOOR_MB * 1024)  # fmt: skip

    def old_snapshot(self) -> None:
        """The append rate with another transaction open for a minute."""
        print("\n64 writers on one session while another transaction stays open:")
        session = self.new_session()
        with psycopg.connect(self.cluster.url) as other:
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            other.execute("SELECT count(*) FROM collab_sessions")
            first = load.append_rate([self.address], session, 10)
            load.append_rate([self.address], session, 40)
            last = load.append_rate([self.address], session, 10)
        print(f"  {'in the first ten seconds':<58} {first:>14,.0f}/s")
        print(f"  {'in the last ten seconds of a minute':<58} {last:>14,.0f}/s")
        ratio = last / first
        self.tell("last / first", f"{ratio:.2f}", f">= {OLD_SNAPSHOT_FLOOR}", ratio >= OLD_SNAPSHOT_FLOOR)

    def live(self) -> None:
        """How soon events arrive at followers, and what followers cost."""
        print(f"\nFollowing a session at {RATE} events/s, from the call of AppendEvent to delivery, p50 / p99,")
        print(f"medians of {REPEATS} runs in turn:")
        first, last = self.all_addresses[0], self.all_addresses[-1]
        follows = {"same server": first, "another server": last}
        found: dict[str, list[live.Delays]] = {"echo": [], **{where: [] for where in follows}, "many": []}
        for _ in range(REPEATS):
            found["echo"].append(live.echo(RATE, 5))
            for where, address in follows.items():
                session = self.new_session()
                found[where].append(live.delivery(first, address, session, followers=1, rate=RATE, seconds=5))
            session = self.new_session()
            found["many"].append(live.delivery(first, first, session, followers=MANY, rate=RATE, seconds=5))
        medians = {
            what: (statistics.median(delays.p50 for delays in runs), statistics.median(delays.p99 for delays in runs))
            for what, runs in found.items()
        }
        print(f"  {'a grpc.aio echo that stores nothing':<58} {in_ms(*medians['echo']):>16}")
        for where, (p50, p99) in DELIVERY_FLOORS.items():
            if where == "another server" and first == last:
                continue
            holds = medians[where][0] <= p50 and medians[where][1] <= p99
            self.tell(f"1 follower, {where}", in_ms(*medians[where]), f"<= {p50:g} / {p99:g}", holds)
        many = medians["many"]
        self.tell(
            f"{MANY} followers, {MANY * RATE:,} deliveries/s", in_ms(*many), f"<= - / {MANY_P99_FLOOR:g}",
            many[1] <= MANY_P99_FLOOR,
        )  # fmt: skip
        pid = self.server.process.pid
        each = live.idle_followers(first, self.new_session(), pid, followers=IDLE, connections=IDLE_CONNECTIONS)
        self.tell(
            f"{IDLE:,} idle followers on {IDLE_CONNECTIONS} connections, memory of each", f"{each:.1f} kB",
            f"<= {IDLE_KB_FLOOR:g} kB", each <= IDLE_KB_FLOOR,
        )  # fmt: skip
        rate, grown = live.paused_follower(first, self.new_session(), pid, seconds=60)
        print(f"  {'64 writers for a minute with a paused follower':<58} {rate:>14,.0f}/s")
        self.tell(
            "the server's resident memory grew by", f"{grown / 1024:.1f} MB", f"<= {PAUSED_MB_FLOOR} MB",
            grown <= PAUSED_MB_FLOOR * 1024,
        )  # fmt: skip

    def web(self) -> None:
        """The JSON gateway as a process of its own, beside the same through gRPC."""
        print(f"\nThrough a gateway of its own, {web.CONNECTIONS} connections, medians of {REPEATS} runs in turn:")
        grpc_rates, http_rates, delays = [], [], []
        with GatewayProcess(self.address, cwd=self.directory) as gateway:
            address = gateway.http_address
            web.append_rate(address, self.new_session(), 3)  # warm
            for _ in range(REPEATS):
                grpc_rates.append(load.append_rate([self.address], self.new_session(), 8))
                http_rates.append(web.append_rate(address, self.new_session(), 8))
                delays.append(web.delivery(address, self.new_session(), rate=RATE, seconds=5))
            session = self.new_session()
            self.fill(session, WEB_EVENTS)
            listed = statistics.median(web.listing_rate(address, session, WEB_EVENTS) for _ in range(REPEATS))
        for what, rates in (("AppendEvent over gRPC", grpc_rates), ("POST /api/collab/events", http_rates)):
            print(f"  {what:<58} {statistics.median(rates):>14,.0f}/s   {spread(rates)}")
        ratio = statistics.median(http_rates) / statistics.median(grpc_rates)
        self.tell("HTTP / gRPC", f"{ratio:.2f}", f">= {WEB_FLOOR}", ratio >= WEB_FLOOR)
        print(f"  {f'GET {WEB_EVENTS:,} events as lines of JSON':<58} {listed:>14,.0f}/s")
        p50, p99 = (statistics.median(values) for values in zip(*delays, strict=True))
        print(f"  {f'from POST to server-sent event, {RATE} events/s, p50 / p99':<58} {in_ms(p50, p99):>16}")


def in_ms(p50: float, p99: float) -> str:
    """Return two delays as text."""
    return f"{p50:.2f} / {p99:.2f} ms"


def spread(values: list[float]) -> str:
    """Return the lowest and the highest of some rates."""
    return f"({min(values):,.0f} to {max(values):,.0f})"


@contextmanager
def running() -> Iterator[Bench]:
    """Start a PostgreSQL and a server for each core in front of it."""
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
        with ExitStack() as stack:
            servers = [ServeProcess("--database-url", cluster.url, cwd=directory) for _ in range(os.cpu_count() or 1)]
            yield Bench(cluster, [stack.enter_context(server) for server in servers], directory)
    finally:
        cluster.stop()
        data.release()
        shutil.rmtree(directory)


def main() -> int:
    """Run the benchmarks; return 1 when one is below its floor."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=["unary", "reading", "old_snapshot", "live", "web", []], help="which ones"
    )
    chosen = parser.parse_args().only
    version = subprocess.run(["uname", "-sm"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{os.cpu_count()} cores, {version}, Python {sys.version.split()[0]}; load by {load.load_generator()}\n")
    with running() as bench:
        every: dict[str, Callable[[], None]] = {
            "unary": bench.unary,
            "reading": bench.reading,
            "old_snapshot": bench.old_snapshot,
            "live": bench.live,
            "web": bench.web,
        }
        for name, run in every.items():
            if not chosen or name in chosen:
                run()
        return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
