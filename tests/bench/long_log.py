"""How the service does when a session and its database become long, beside empty ones."""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.bench import writers
from tests.bench.live import Delays
from tests.bench.percentiles import REPEATS, medians_in_turn, percentiles
from tests.bench.pictures import Curve, Panel, Picture
from tests.bench.report import Report
from tests.bench.servers import BATCH, Server, serving

WRITERS = 64
APPEND_FLOOR = 0.85
READ_CEILING = 1.5
"""Of the p50 of a read, to that of the same read of few events."""
FEW_EVENTS = 1_000
PAGE = 500
READS = 200
"""Reads of each kind."""
_FEW_PAGE, _FEW_FOLLOW = "page of few events", "follow of few events"
_REFERENCES = {
    "first page": _FEW_PAGE,
    "page anywhere": _FEW_PAGE,
    "last page": _FEW_PAGE,
    "first message of a follow": _FEW_FOLLOW,
}
"""What is read of the session that grows, and what that is compared with."""


def growing_log(cluster: Cluster, directory: Path, report: Report, sizes: Sequence[int]) -> None:
    """Fill a session to one size after the other; measure appends and reads each time."""
    report.section(f"A session of up to {sizes[-1]:,} events beside an empty one in an empty database")
    rates, reads = [], []
    with serving(cluster, directory, "empty") as empty, serving(cluster, directory, "grown") as grown:
        [few], [session] = empty.new_sessions(1), grown.new_sessions(1)
        empty.fill(few, FEW_EVENTS)
        for size in sizes:
            _fill(report, grown, session, size)
            reads.append(_delays_in_turn(empty, few, grown, session))
            _tell_delays(report, size, reads[-1])
            at_empty, at_grown = medians_in_turn(
                lambda: writers.write(empty.address, empty.new_sessions(1), writers=WRITERS, seconds=2).rate,
                lambda: writers.write(grown.address, [session], writers=WRITERS, seconds=2).rate,
            )
            rates.append((at_empty, at_grown))
            ratio = at_grown / at_empty
            report.tell(
                f"{WRITERS} writers at {size:,} / at 0, medians of {REPEATS} in turn", f"{at_grown:,.0f}/s",
                f">= {APPEND_FLOOR}", ratio >= APPEND_FLOOR, ratio=ratio,
            )  # fmt: skip
    report.show(_picture(sizes, rates, reads))


def _fill(report: Report, server: Server, session: int, size: int) -> None:
    before, started = server.head(session), time.perf_counter()
    server.fill(session, size)
    rate = (size - before) / (time.perf_counter() - started)
    server.settle()
    report.tell(
        f"filled to {size:,} with {BATCH:,} to an append; the database",
        f"{rate:,.0f}/s, {server.database_gigabytes():.2f} GB",
    )


def _delays_in_turn(empty: Server, few: int, grown: Server, session: int) -> dict[str, Delays]:
    """Read from both sessions in turn, from the call to the first message, which is the whole page."""
    head, places = grown.head(session), random.Random(1)
    found: dict[str, list[float]] = {}
    with grpc.insecure_channel(empty.address) as empty_channel, grpc.insecure_channel(grown.address) as grown_channel:
        at_empty, at_grown = CollabServiceStub(empty_channel), CollabServiceStub(grown_channel)
        for _ in range(READS):
            for what, stub, request in (
                (_FEW_PAGE, at_empty, _page_of(few, 0)),
                ("first page", at_grown, _page_of(session, 0)),
                ("page anywhere", at_grown, _page_of(session, places.randrange(head - PAGE))),
                ("last page", at_grown, _page_of(session, head - PAGE)),
                (_FEW_FOLLOW, at_empty, _follow_of(few, FEW_EVENTS)),
                ("first message of a follow", at_grown, _follow_of(session, head)),
            ):
                started = time.perf_counter()
                call = stub.ListEvents(request)
                message = next(call)
                found.setdefault(what, []).append((time.perf_counter() - started) * 1e3)
                call.cancel()
                if len(message.events) != request.limit:
                    raise RuntimeError(f"{len(message.events)} events came, not {request.limit}")
    return {what: percentiles(delays) for what, delays in found.items()}


def _page_of(session: int, since: int) -> pb.ListEventsRequest:
    return pb.ListEventsRequest(session_id=session, since_server_seq=since, limit=PAGE)


def _follow_of(session: int, head: int) -> pb.ListEventsRequest:
    return pb.ListEventsRequest(session_id=session, since_server_seq=head, follow=True)


def _tell_delays(report: Report, size: int, delays: Mapping[str, Delays]) -> None:
    for what, reference in _REFERENCES.items():
        p50, p99 = delays[what]
        ratio = p50 / delays[reference].p50
        report.tell(
            f"{what} at {size:,} / at {FEW_EVENTS:,}, p50 / p99", f"{p50:.2f} / {p99:.2f} ms",
            f"<= {READ_CEILING}", ratio <= READ_CEILING, ratio=ratio,
        )  # fmt: skip


def _picture(
    sizes: Sequence[int], rates: Sequence[tuple[float, float]], reads: Sequence[Mapping[str, Delays]]
) -> Picture:
    names = [f"{size:,}" for size in sizes]
    appends = [
        Curve("this session", ["0", *names], [rates[0][0], *(at_grown for _, at_grown in rates)]),
        Curve("an empty one beside it", names, [at_empty for at_empty, _ in rates]),
    ]
    delays = [
        Curve(what, [f"{FEW_EVENTS:,}", *names], [reads[0][reference].p50, *(read[what].p50 for read in reads)])
        for what, reference in _REFERENCES.items()
    ]
    return Picture(
        "growth-log",
        f"A session of up to {sizes[-1]:,} events",
        [Panel("events", f"appends/s of {WRITERS} writers", appends), Panel("events", "p50 of a read, ms", delays)],
    )
