"""What `collab bench` prints."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from collab_service.cli.figures import Figures
from collab_service.cli.histogram import Histogram
from collab_service.cli.loads import Order
from collab_service.cli.output import Output, events_in_words, print_json, say

_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_WIDTH = 9
"""Characters of a column."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has come of a load."""

    order: Order
    figures: Figures
    stored: int | None
    """Events in the sessions at the end; None when the service does not say."""
    kept: Sequence[int]
    """Sessions that are still there."""
    is_interrupted: bool


class Progress:
    """A line that tells how it goes, on standard error; it is seen on a terminal only, and goes."""

    def __init__(self, order: Order, output: Output) -> None:
        console = Console(stderr=True)
        self._order = order
        self._live: Live | None = None
        if output is Output.TEXT and console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def show(self, figures: Figures) -> None:
        """Show what there is so far."""
        if self._live is not None:
            self._live.update(Text(_progress(self._order, figures), no_wrap=True, overflow="ellipsis"), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _progress(order: Order, figures: Figures) -> str:
    if not figures.begin:
        return "starting"
    passed = (time.monotonic_ns() - figures.begin) / 1e9
    if passed < 0:
        return f"warming up, {-passed:.0f} s to go"
    parts = [
        f"{passed:.0f} s" if order.duration is None else f"{passed:.0f} of {order.duration:g} s",
        events_in_words(figures.events),
        f"{_per_second(figures.events, figures):,.0f}/s",
        f"p99 {figures.latency.percentile(99) / 1e6:.1f} ms",
    ]
    if failed := sum(failures.count for failures in figures.failures.values()):
        parts.append(f"{failed:,} failed")
    return ", ".join(parts)


def print_outcome(outcome: Outcome, output: Output) -> None:
    """Print all figures."""
    if output is Output.JSON:
        print_json(_form(outcome))
    else:
        for line in _lines(outcome):
            say(line)


def in_words(count: int, noun: str) -> str:
    """Return a number of things, as text."""
    return f"{count:,} {noun if count == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def _lines(outcome: Outcome) -> list[str]:
    order, figures = outcome.order, outcome.figures
    payload = figures.events * order.payload_bytes
    lines = [
        f"{in_words(order.writers, 'writer')} in {in_words(order.processes, 'process')}, "
        f"{in_words(len(order.sessions), 'session')}, {in_words(order.followers, 'follower')}, "
        f"{in_words(order.batch, 'event')} of {in_words(order.payload_bytes, 'byte')} to an append, "
        f"{'streamed' if order.stream else 'each a call'}",
        "",
        f"events     {figures.events:,} in {figures.seconds:.1f} s, {_per_second(figures.events, figures):,.0f}/s, "
        f"{_per_second(payload, figures) / 1e6:,.2f} MB/s of payload",
        f"appends    {figures.appends:,}, {_per_second(figures.appends, figures):,.0f}/s",
        "",
        f"ms         {''.join(name.rjust(_WIDTH) for name in _milliseconds(figures.latency))}",
        f"append     {_row(figures.latency)}",
    ]
    if order.followers:
        lines += [f"delivery   {_row(figures.lag)}", "", f"delivered  {_delivered(outcome)}"]
    if outcome.kept:
        first, last = outcome.kept[0], outcome.kept[-1]
        told = f"session {first}" if first == last else f"{len(outcome.kept):,} sessions, {first} to {last}"
        lines += ["", f"kept       {told}"]
    return lines


def _delivered(outcome: Outcome) -> str:
    figures = outcome.figures
    told = f"{events_in_words(figures.lag.count)}, {_per_second(figures.lag.count, figures):,.0f}/s"
    if outcome.stored is None:
        return f"{told}; whether these are all is not known"
    if not figures.misplaced and not figures.missing:
        return f"{told}, to each follower each one once and in order"
    return f"{told}; {figures.misplaced:,} twice, out of order or behind a gap; {figures.missing:,} are missing"


def _row(times: Histogram) -> str:
    values = _milliseconds(times).values()
    return "".join(f"{value:{_WIDTH},.2f}" if times.count else "-".rjust(_WIDTH) for value in values)


def _form(outcome: Outcome) -> dict[str, Any]:
    order, figures = outcome.order, outcome.figures
    return {
        "settings": {
            "target": order.target,
            "writers": order.writers,
            "sessions": len(order.sessions),
            "payloadBytes": order.payload_bytes,
            "batch": order.batch,
            "stream": order.stream,
            "followers": order.followers,
            "processes": order.processes,
            "connections": order.connections,
            "warmUpSeconds": order.warm_up,
            "durationSeconds": order.duration,
            "events": order.events,
        },
        "interrupted": outcome.is_interrupted,
        "seconds": round(figures.seconds, 6),
        "events": figures.events,
        "appends": figures.appends,
        "eventsPerSecond": round(_per_second(figures.events, figures), 1),
        "appendsPerSecond": round(_per_second(figures.appends, figures), 1),
        "payloadBytesPerSecond": round(_per_second(figures.events * order.payload_bytes, figures), 1),
        "latencyMs": _times(figures.latency),
        "deliveryLagMs": _times(figures.lag),
        "delivered": figures.lag.count,
        "deliveredPerSecond": round(_per_second(figures.lag.count, figures), 1),
        "misplaced": figures.misplaced,
        "missing": None if outcome.stored is None else figures.missing,
        "warmUpEvents": figures.warm_up_events,
        "doubtfulEvents": figures.doubtful_events,
        "storedEvents": outcome.stored,
        "errors": {
            reason: {"count": failures.count, "message": failures.example}
            for reason, failures in figures.failures.items()
        },
        "sessionIds": list(outcome.kept),
    }


def _times(times: Histogram) -> dict[str, float] | None:
    if not times.count:
        return None
    return {name.replace(".", ""): round(value, 4) for name, value in _milliseconds(times).items()}


def _milliseconds(times: Histogram) -> dict[str, float]:
    percentiles = {name: times.percentile(percent) for name, percent in _PERCENTILES.items()}
    values = {"min": times.least, "mean": times.mean, **percentiles, "max": times.most}
    return {name: value / 1e6 for name, value in values.items()}


def _per_second(count: int, figures: Figures) -> float:
    return count / figures.seconds if figures.seconds else 0.0
