"""Keeps the metrics of a process, and answers those who ask for them.

With several workers a question reaches any one of them, so each keeps its numbers in files that the others read
(https://prometheus.github.io/client_python/multiprocess/). The files are named by the worker's number and not by its
process: one that is started again counts on from where the one before was killed.

What is counted often is added up in a `Tally`, and what has a state is looked at (`look`), both only when somebody asks
and once a second for the other workers: so counting costs a twentieth of a microsecond, and a state nothing at all.
"""

import asyncio
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Literal, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from collab_service import __version__, memory

_INTERVAL = 1.0
"""Seconds between two refreshes for the other workers."""
_IN_MEMORY = "/dev/shm"
_PREFIX = "collab-metrics-"
_SETTLED = 60.0
"""Seconds after which whoever has made a directory has certainly locked it."""

disable_created_metrics()  # a series beside each counter that says when it began, which the files do not have


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; raises `OSError` when somebody else does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_what_was_left(where: str) -> None:
    """Remove the directories of servers that were killed and could not do it themselves: nobody holds their locks."""
    for directory in Path(where).glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(directory):
            if time.time() - directory.stat().st_mtime > _SETTLED:
                shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """Where workers keep their metrics."""

    directory: str

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[Self]:
        """Make the directory, for the length of the block.

        In memory where that is possible: a write to a file on a disk may wait until the system has written what was
        written before (https://www.evanjones.ca/jvm-mmap-pause.html).
        """
        where = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK | os.X_OK) else gettempdir()
        _remove_what_was_left(where)
        with (
            TemporaryDirectory(prefix=_PREFIX, dir=where, ignore_cleanup_errors=True) as directory,
            _locked(Path(directory)),
        ):
            yield cls(directory)

    def forget_states_of(self, worker: int) -> None:
        """Let go of what a worker that has ended was like; what it has counted stays."""
        mark_process_dead(worker, self.directory)

    def by_worker(self) -> dict[int, list[str]]:
        """Return the paths of the files, by the number of the worker they belong to."""
        found: dict[int, list[str]] = {}
        for path in sorted(Path(self.directory).glob("*.db")):
            found.setdefault(int(path.stem.rpartition("_")[2]), []).append(str(path))
        return dict(sorted(found.items()))


class Tally:
    """Adds up what happens often, until the next refresh."""

    __slots__ = ("_count", "_counter")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._count = 0.0

    def add(self, count: float = 1) -> None:
        """Add to it; takes 50 ns, where the counter itself takes 300, and 600 in a file."""
        self._count += count

    def flush(self) -> None:
        """Move what has been added up to the counter."""
        if self._count:
            self._counter.inc(self._count)
            self._count = 0.0


class Metrics:
    """The metrics of this process. One object for a process that shares them; any number otherwise, as in tests."""

    def __init__(self, files: SharedFiles | None = None, worker: int = 1) -> None:
        """Prepare.

        Args:
            files: Where workers share theirs; None for a process that is alone.
            worker: This worker's number, from 1 on.
        """
        self._files = files
        self._worker = worker
        if files is None:
            values.ValueClass = values.MutexValue
        else:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = files.directory
            values.ValueClass = values.MultiProcessValue(lambda: worker)
        self._registry = CollectorRegistry()
        self._tallies: list[Tally] = []
        self._looks: list[tuple[Gauge, Callable[[], float]]] = []
        self._cpu_seconds = 0.0
        self._declare_process()

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        """Declare a counter; its name ends with `_total`."""
        return Counter(name, meaning, labels, registry=self._registry)

    def tally(self, counter: Counter, *labels: str) -> Tally:
        """Return a tally of a counter, or of its part with these labels."""
        tally = Tally(counter.labels(*labels) if labels else counter)
        self._tallies.append(tally)
        return tally

    def histogram(self, name: str, meaning: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """Declare a histogram; `buckets` are the upper ends, in rising order."""
        return Histogram(name, meaning, labels, registry=self._registry, buckets=buckets)

    def gauge(
        self,
        name: str,
        meaning: str,
        labels: Sequence[str] = (),
        *,
        of_all: Literal["livesum", "livemin", "livemax"] = "livesum",
    ) -> Gauge:
        """Declare a gauge; `of_all` says what makes one number of those of all workers."""
        return Gauge(name, meaning, labels, registry=self._registry, multiprocess_mode=of_all)

    def look(self, gauge: Gauge, state: Callable[[], float]) -> None:
        """Set a gauge to what a function returns, whenever it matters."""
        self._looks.append((gauge, state))

    async def run(self) -> None:
        """Keep what the other workers answer up to date, for ever."""
        while True:
            self.refresh()
            await asyncio.sleep(_INTERVAL)

    def refresh(self) -> None:
        """Bring everything up to date."""
        for tally in self._tallies:
            tally.flush()
        for gauge, state in self._looks:
            gauge.set(state())
        cpu_seconds = time.process_time()
        self._cpu.inc(max(cpu_seconds - self._cpu_seconds, 0))
        self._cpu_seconds = cpu_seconds

    def exposition(self, accept: str, *, per_worker: bool) -> tuple[bytes, str]:
        """Return the metrics as text, and its content type.

        Args:
            accept: What the reader accepts, as in the header: Prometheus's own format, or OpenMetrics.
            per_worker: Give each worker's numbers apart, with the label `worker`, and not those of all together.
        """
        self.refresh()
        encode, content_type = choose_encoder(accept)
        return encode(_Families(self._families(per_worker))), content_type

    def _families(self, per_worker: bool) -> Iterable[Metric]:
        if self._files is None:
            workers = {self._worker: list(self._registry.collect())}
        else:
            files = self._files.by_worker()
            if not per_worker:
                return _merged([path for paths in files.values() for path in paths])
            workers = {worker: list(_merged(paths)) for worker, paths in files.items()}
        return _labelled(workers) if per_worker else workers[self._worker]

    def _declare_process(self) -> None:
        """Declare what is known of any process. The library's own collector does not work with several workers."""
        build = self.gauge("collab_build_info", "Always 1; the label tells the version.", ["version"], of_all="livemax")
        build.labels(__version__).set(1)
        self.gauge("collab_processes", "Processes that serve.").set(1)
        self.counter(
            "collab_process_starts_total",
            "Processes that were started, those in place of others that have died included.",
        ).inc()
        self._cpu = self.counter(
            "process_cpu_seconds_total", "CPU time of the processes that serve, user and system together."
        )
        if memory.tells_resident_bytes():
            resident = self.gauge(
                "process_resident_memory_bytes",
                "Resident memory of the processes that serve; what they share counts for each.",
            )
            self.look(resident, memory.resident_bytes)


class _Families(Collector):
    """Metrics that have been collected, as the library's encoders want them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = sorted(families, key=lambda family: family.name)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _merged(paths: list[str]) -> Iterable[Metric]:
    merged: Iterable[Metric] = MultiProcessCollector.merge(paths)
    return merged


def _labelled(workers: dict[int, list[Metric]]) -> Iterable[Metric]:
    """Return the metrics of several workers as one list, in which a label tells whose each number is."""
    together: dict[str, Metric] = {}
    for worker, families in workers.items():
        for family in families:
            whole = together.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [
                sample._replace(labels={**sample.labels, "worker": str(worker)}) for sample in family.samples
            ]
    return together.values()
