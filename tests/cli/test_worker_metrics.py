"""Metrics of several workers: whoever is asked tells of all, and one that dies takes nothing back."""

import os
import signal
import stat
from pathlib import Path

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.test_workers import children_of, connected, ended, follow, orphaned, started
from tests.processes import ServeProcess
from tests.rpc.calls import append, events, new_session
from tests.scrapes import Scrape, scrape
from tests.waiting import until


async def shows(address: str, name: str, value: float, **labels: str) -> Scrape:
    """Wait until a metric has a value for all workers together, whichever is asked; return the metrics."""
    told: list[Scrape] = []

    async def has() -> bool:
        told.append(scrape(address))
        return told[-1].value(name, **labels) == value

    await until(has, f"{name} to be {value}")
    return told[-1]


async def test_sums_and_each(database_url: str, directory: Path) -> None:
    """Whichever worker is asked, the answer is the sum over all; with `per=worker` it is each, and no sum."""
    with (
        started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process,
        connected(process, 2) as channels,
    ):
        address = process.http_address
        stubs = {number: CollabServiceStub(channel) for number, channel in channels.items()}
        session_id = new_session(stubs[1])
        for _ in range(5):
            append(stubs[1], session_id)
        for number, stub in stubs.items():
            for _ in range(number):
                assert len(events(stub, session_id)) == 5
        whole = await shows(address, "collab_read_events_total", 15, reader="calls")
        assert whole.value("collab_read_page_seconds_count", reader="calls") == 3
        assert whole.value("collab_read_page_seconds_bucket", reader="calls", le="+Inf") == 3
        assert whole.value("collab_processes") == whole.value("collab_process_starts_total") == 2
        assert whole.value("collab_database_pool_max_connections", pool="calls") == 20
        assert whole.value("collab_database_up") == 1
        assert not any("worker" in sample.labels for sample in whole.samples)
        for _ in range(10):  # some of which reach one worker, some the other
            each = scrape(address, per_worker=True)
            assert all("worker" in sample.labels for sample in each.samples)
            for worker in ("1", "2"):
                assert each.value("collab_read_events_total", reader="calls", worker=worker) == 5 * int(worker)
                assert each.value("collab_database_pool_max_connections", pool="calls", worker=worker) == 10
                assert each.value("process_resident_memory_bytes", worker=worker) > 20e6
            assert scrape(address).value("collab_read_events_total", reader="calls") == 15
        assert process.stop() == 0


async def test_a_worker_that_is_killed(database_url: str, directory: Path) -> None:
    """`kill -9` of a worker: its counts stay and go on, its state is gone, and it keeps its number."""
    with started(ServeProcess("--database-url", database_url, "--workers", "2", cwd=directory)) as process:
        address = process.http_address
        with connected(process, 2) as channels:
            session_id = new_session(CollabServiceStub(channels[1]))
            append(CollabServiceStub(channels[1]), session_id)
            follows = [follow(channel, session_id) for channel in channels.values()]
            await shows(address, "collab_followers", 2)
            before = await shows(address, "collab_read_events_total", 2)
            os.kill(children_of(process.process.pid)[0], signal.SIGKILL)
            killed = process.wait_for("a worker has ended, starting another")["number"]
            told = await shows(address, "collab_followers", 1)
            assert told.value("collab_read_events_total") == 2
            await shows(address, "collab_process_starts_total", 3)
            await shows(address, "collab_processes", 2)
        del follows
        each = scrape(address, per_worker=True)
        assert each.value("collab_read_events_total", worker=str(killed)) == 1
        assert each.value("collab_process_starts_total", worker=str(killed)) == 2
        with connected(process, 2) as channels:
            assert len(events(CollabServiceStub(channels[killed]), session_id)) == 1
        told = await shows(address, "collab_read_events_total", 3)
        for sample in before.samples:
            if before.kinds.get(sample.name) and before.kinds[sample.name].type == "counter":
                assert told.value(sample.name, **sample.labels) >= sample.value, sample
        assert scrape(address, per_worker=True).value("collab_read_events_total", worker=str(killed)) == 2
        assert process.stop() == 0


async def test_nothing_is_left(database_url: str, directory: Path) -> None:
    """What workers share is in a directory that nobody else may enter, and that goes with them.

    Where the server was killed, the next one removes it; never that of one that runs.
    """
    arguments = ("--database-url", database_url, "--workers", "2")
    with started(ServeProcess(*arguments, cwd=directory)) as process:
        left = shared_directory(process)
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
        pids = children_of(process.process.pid)
        with orphaned(process, pids):
            await ended(pids)
    assert left.exists()
    with started(ServeProcess(*arguments, cwd=directory)) as one:
        used = shared_directory(one)
        for path in (left, used):
            os.utime(path, (0, 0))  # made long ago
        with started(ServeProcess(*arguments, cwd=directory)) as other:
            own = shared_directory(other)
            assert (left.exists(), used.exists(), own.exists()) == (False, True, True)
            assert other.stop() == one.stop() == 0
            assert (used.exists(), own.exists()) == (False, False)


def shared_directory(process: ServeProcess) -> Path:
    """Return the directory in which a server's workers, once they serve, keep their metrics."""
    process.wait_for("serving")
    (found,) = {
        Path(line.split()[-1]).parent
        for pid in children_of(process.process.pid)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/counter_" in line
    }
    return found
