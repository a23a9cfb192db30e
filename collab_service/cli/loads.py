"""Several processes that put load on a service: started and told what to do by this one, which adds up what they see.

One process of Python that calls the service keeps a core busy, so more load takes more of them.
"""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Self

import msgspec

from collab_service.cli.failure import CommandError
from collab_service.cli.figures import Figures

STOP = b"stop\n"
_HEAD_START = 0.1
"""Seconds from the word to begin until all begin, at the same moment."""
LINE = 16 * 1024 * 1024
"""Bytes that no line exceeds, either way: 10,000 sessions, or two histograms of fewer than 7,500 buckets."""
_LAST_WAIT = 5.0
"""Seconds in which a process ends when it is told to."""


@dataclass(frozen=True, slots=True)
class Order:
    """What load to put on the service, and which share of it is this process's: every `processes`-th of all writers
    and followers, beginning with number `process`."""

    target: str
    sessions: Sequence[int]
    writers: int
    followers: int
    batch: int
    payload_bytes: int
    stream: bool
    connections: int
    warm_up: float
    """Seconds before anything is measured."""
    duration: float | None
    """Seconds that are measured; None: until all events are written."""
    events: int | None
    """Events to write in all processes, the warm-up not counted; None: as many as come in that time."""
    process: int = 0
    processes: int = 1


class Phase(StrEnum):
    """How far a process is."""

    READY = "ready"
    """Connected, and everybody follows."""
    WRITING = "writing"
    WRITTEN = "written"
    """Every append has been answered."""
    DONE = "done"
    """Every follower has what there is, or has waited for it in vain."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a process says, a line each, every second and whenever a phase is reached."""

    phase: Phase
    figures: Figures
    """So far."""


class Loads:
    """The processes. Leaving the context ends those that have not ended."""

    def __init__(self, order: Order) -> None:
        """Prepare.

        Args:
            order: What all of them do together.
        """
        self._order = order
        self._processes: list[asyncio.subprocess.Process] = []
        self._reports: dict[int, Figures] = {}

    async def __aenter__(self) -> Self:
        """Start them, and wait until they are ready."""
        try:
            for number in range(self._order.processes):
                process = await asyncio.create_subprocess_exec(
                    # -P: it imports nothing from the working directory, as the command `collab` does not.
                    sys.executable, "-P", "-c", "from collab_service.cli.load import main; main()",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE,
                    start_new_session=True,  # a Ctrl-C at the terminal is for us to act on
                )  # fmt: skip
                self._processes.append(process)
                assert process.stdin is not None
                process.stdin.write(msgspec.json.encode(replace(self._order, process=number)) + b"\n")
            await self._reach(Phase.READY)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End them."""
        await self._end()

    @property
    def figures(self) -> Figures:
        """What all have seen so far."""
        together = Figures()
        for figures in self._reports.values():
            together.merge(figures)
        return together

    async def write(self) -> None:
        """Let them write, until the time is over or all events are written."""
        begin = time.monotonic_ns() + round((_HEAD_START + self._order.warm_up) * 1e9)
        self._tell(b"%d\n" % begin)
        await self._reach(Phase.WRITTEN)

    def stop(self) -> None:
        """Let them write no more; what is under way is waited for."""
        self._tell(STOP)

    async def finish(self, heads: Mapping[int, int]) -> None:
        """Wait until the followers have everything up to these numbers of the sessions, as long as something comes."""
        self._tell(msgspec.json.encode(heads) + b"\n")
        await self._reach(Phase.DONE)

    def _tell(self, line: bytes) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)

    async def _reach(self, phase: Phase) -> None:
        await asyncio.gather(*(self._listen(number, phase) for number in range(len(self._processes))))

    async def _listen(self, number: int, phase: Phase) -> None:
        process = self._processes[number]
        assert process.stdout is not None
        async for line in process.stdout:
            report = msgspec.json.decode(line, type=Report)
            self._reports[number] = report.figures
            if report.phase is phase:
                return
        raise CommandError(f"a process that puts load on the service has ended with status {await process.wait()}")

    async def _end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        try:
            async with asyncio.timeout(_LAST_WAIT):
                for process in self._processes:
                    await process.wait()
        except TimeoutError:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
