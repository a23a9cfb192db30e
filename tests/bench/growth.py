"""How the service grows: with the writers, the payloads, the sessions and the events that it has.

Each section has a new database and a new server.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from collab_service.storage.embedded import Cluster
from tests.bench.long_log import growing_log
from tests.bench.percentiles import REPEATS, medians_in_turn
from tests.bench.pictures import Curve, Panel, Picture
from tests.bench.report import Report
from tests.bench.servers import serving
from tests.bench.writers import Written, write
from tests.memory import resident_kilobytes

WRITERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_000)
FEW, MANY = 64, 1_000
"""Writers, where something else grows."""
PAYLOADS = {"0 B": 0, "100 B": 100, "1 KiB": 2**10, "10 KiB": 10 * 2**10, "100 KiB": 100 * 2**10, "1 MiB": 2**20}
BYTES_ON_THEIR_WAY = 8 * 2**20
"""Payloads that are sent at the same time at most: half of what may wait for a session."""
SESSIONS = (1, 10, 100, 1_000, 10_000)
SESSIONS_FLOOR = 0.7
SIZES = (100_000, 1_000_000)
LARGE_SIZE = 10_000_000
LARGE_DISK_GB = 10
SECONDS = 2
"""Of each measurement."""


def run(cluster: Cluster, directory: Path, report: Report, *, large: bool) -> None:
    """Measure all of it, in less than three minutes.

    Args:
        cluster: The PostgreSQL for the databases, which are dropped again.
        directory: Where the servers run.
        report: Where to tell.
        large: Go on to 10,000,000 events, which takes some minutes and 10 GB of disk for a while.
    """
    free = shutil.disk_usage(directory).free / 1e9
    if large and free < LARGE_DISK_GB:
        raise SystemExit(f"{LARGE_SIZE:,} events need {LARGE_DISK_GB} GB of disk, and {free:.0f} GB are free")
    growing_writers(cluster, directory, report)
    growing_payloads(cluster, directory, report)
    growing_sessions(cluster, directory, report)
    growing_log(cluster, directory, report, [*SIZES, LARGE_SIZE] if large else SIZES)


def growing_writers(cluster: Cluster, directory: Path, report: Report) -> None:
    """Append with more and more writers to one session."""
    report.section("1 to 1,000 writers on one session, 200-byte payloads, p50 / p99 from call to answer")
    found = []
    with serving(cluster, directory, "writers") as server:
        session = server.new_sessions(1)
        for count in WRITERS:
            point = write(server.address, session, writers=count, seconds=SECONDS)
            p50, p99 = point.delays
            report.tell(_counted(count, "writer"), f"{point.rate:,.0f}/s, {p50:.1f} / {p99:.1f} ms")
            found.append(point)
    _tell_busy(report, found)
    rates = Curve("one session", WRITERS, [point.rate for point in found])
    delays = [
        Curve("p50", WRITERS, [point.delays.p50 for point in found]),
        Curve("p99", WRITERS, [point.delays.p99 for point in found]),
    ]
    panels = [Panel("writers", "appends/s", [rates]), Panel("writers", "from call to answer, ms", delays)]
    report.show(Picture("growth-writers", "1 to 1,000 writers on one session", panels))


def growing_payloads(cluster: Cluster, directory: Path, report: Report) -> None:
    """Append larger and larger events."""
    report.section(f"Payloads of 0 bytes to 1 MiB that cannot be compressed, {FEW} writers on one session")
    found, megabytes = [], {}
    with serving(cluster, directory, "payloads") as server:
        session = server.new_sessions(1)
        for name, size in PAYLOADS.items():
            count = min(FEW, BYTES_ON_THEIR_WAY // max(size, 1))
            point = write(server.address, session, writers=count, seconds=SECONDS, payload_bytes=size)
            megabytes[name] = point.rate * size / 1e6
            report.tell(
                name if count == FEW else f"{name}, {count} writers", f"{point.rate:,.0f}/s, {megabytes[name]:.1f} MB/s"
            )
            found.append(point)
    _tell_busy(report, found)
    rates = Curve("events", list(PAYLOADS), [point.rate for point in found])
    del megabytes["0 B"]  # has no place on a logarithmic scale
    volume = Curve("payloads", list(megabytes), list(megabytes.values()))
    panels = [Panel("payload", "events/s", [rates]), Panel("payload", "MB/s", [volume])]
    report.show(Picture("growth-payloads", "Payloads of 0 bytes to 1 MiB", panels))


def growing_sessions(cluster: Cluster, directory: Path, report: Report) -> None:
    """Append to more and more sessions in turn, each of them at least once."""
    most = SESSIONS[-1]
    report.section(
        f"1 to {most:,} sessions active at once, with {FEW} and with {MANY:,} writers; the server's resident memory"
    )
    found: dict[int, list[Written]] = {FEW: [], MANY: []}
    memory = []
    with serving(cluster, directory, "sessions") as server:
        sessions = server.new_sessions(most)
        for count in SESSIONS:
            for writers, points in found.items():
                points.append(write(server.address, sessions[:count], writers=writers, seconds=SECONDS))
            memory.append(resident_kilobytes(server.pid) / 1024)
            few, many = (points[-1].rate for points in found.values())
            report.tell(_counted(count, "session"), f"{few:,.0f}/s, {many:,.0f}/s, {memory[-1]:.0f} MB")
        one, all_of_them = medians_in_turn(
            lambda: write(server.address, sessions[:1], writers=MANY, seconds=SECONDS).rate,
            lambda: write(server.address, sessions, writers=MANY, seconds=SECONDS).rate,
        )
    _tell_busy(report, [point for points in found.values() for point in points])
    ratio = all_of_them / one
    report.tell(
        f"{most:,} sessions / 1, {MANY:,} writers, medians of {REPEATS} in turn", f"{all_of_them:,.0f}/s",
        f">= {SESSIONS_FLOOR}", ratio >= SESSIONS_FLOOR, ratio=ratio,
    )  # fmt: skip
    rates = [
        Curve(f"{writers:,} writers", SESSIONS, [point.rate for point in points]) for writers, points in found.items()
    ]
    panels = [
        Panel("sessions", "appends/s", rates),
        Panel("sessions", "resident memory of the server, MB", [Curve("server", SESSIONS, memory)]),
    ]
    report.show(Picture("growth-sessions", f"1 to {most:,} sessions active at once", panels))


def _tell_busy(report: Report, found: Iterable[Written]) -> None:
    """Tell what the writers themselves took: with a whole core they are what cannot go faster."""
    report.tell("the writers' own process took of a core at most", f"{max(point.busy for point in found):.2f}")


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
