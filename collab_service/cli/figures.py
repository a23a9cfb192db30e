"""What a load on the service has come to, in bounded memory; the figures of several processes add up."""

from dataclasses import dataclass, field

from collab_service.cli.failure import ExitStatus, status_of
from collab_service.cli.histogram import Histogram
from collab_service.client import ServiceError


@dataclass(slots=True)
class Failures:
    """Calls that failed for one reason."""

    count: int
    example: str
    """What the service said the first time."""
    status: ExitStatus


@dataclass(slots=True)
class Figures:
    """What was seen. Times are nanoseconds of the machine's monotonic clock, which all its processes share."""

    begin: int = 0
    """When the measurement began, the warm-up being over; 0 before the load."""
    end: int = 0
    """When the last acknowledgement came."""
    appends: int = 0
    """Appends that were acknowledged."""
    events: int = 0
    """Events that were acknowledged."""
    warm_up_events: int = 0
    """Events that were acknowledged and not measured."""
    doubtful_events: int = 0
    """Events of appends that failed, and may be stored nevertheless."""
    latency: Histogram = field(default_factory=Histogram)
    """From the call of each append to its acknowledgement."""
    misplaced: int = 0
    """Events that came to a follower twice, or out of order, or behind a gap."""
    missing: int = 0
    """Events that never came to a follower."""
    lag: Histogram = field(default_factory=Histogram)
    """From the call of the append to the delivery of each event to each follower."""
    failures: dict[str, Failures] = field(default_factory=dict)
    """By the name of an `ErrorReason`, or of the client's error where the service gave no answer."""

    @property
    def seconds(self) -> float:
        """How long was measured."""
        return max(0, self.end - self.begin) / 1e9

    def add_failure(self, error: ServiceError) -> None:
        """Count a call that failed."""
        reason = error.reason or type(error).__name__
        failures = self.failures.setdefault(reason, Failures(0, str(error), status_of(error)))
        failures.count += 1

    def merge(self, other: "Figures") -> None:
        """Add those of another process that worked at the same time."""
        self.begin = min(self.begin, other.begin) if self.begin and other.begin else self.begin or other.begin
        self.end = max(self.end, other.end)
        self.appends += other.appends
        self.events += other.events
        self.warm_up_events += other.warm_up_events
        self.doubtful_events += other.doubtful_events
        self.latency.merge(other.latency)
        self.misplaced += other.misplaced
        self.missing += other.missing
        self.lag.merge(other.lag)
        for reason, failures in other.failures.items():
            mine = self.failures.setdefault(reason, Failures(0, failures.example, failures.status))
            mine.count += failures.count
