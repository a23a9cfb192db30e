"""Several processes that serve on one port: started, watched and started again by this one.

Each is a server of its own, with its own pool, sequencer and tails; they need nothing of each other but the database.
The kernel spreads the connections over them (SO_REUSEPORT, https://man7.org/linux/man-pages/man7/socket.7.html).
"""

import asyncio
import pickle
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import structlog

from collab_service.addresses import held_address
from collab_service.cli.process import log_serving
from collab_service.config import Config
from collab_service.logs import LogFormat
from collab_service.metrics import SharedFiles

_log = structlog.get_logger(__name__)

READY = b"ready\n"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a worker that has died is started again."""
_LASTING = 10.0
"""Seconds after which a worker has lived, and the pauses begin anew."""
_MARGIN = 15.0
"""Seconds beyond the grace periods (for calls, then for what waits to be written) after which a worker is killed."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do."""

    number: int
    config: Config
    url: str
    log_format: LogFormat
    metrics_files: SharedFiles


class Workers:
    """The processes, and the port that they share."""

    def __init__(self, config: Config, url: str, log_format: LogFormat) -> None:
        """Prepare.

        Args:
            config: The settings; how many workers is one of them.
            url: The database; its schema must be there.
            log_format: How they log.
        """
        self._config = config
        self._url = url
        self._log_format = log_format
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._served: set[int] = set()
        """The workers that have come to serve, now or earlier."""
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self, stop: asyncio.Event) -> int:
        """Keep the workers running until told to stop; told again, stop at once. Return the exit status.

        Raises:
            AddressError: The port cannot be had.
        """
        with ExitStack() as ports, SharedFiles.temporary() as self._metrics_files:
            grpc_address = ports.enter_context(held_address(self._config.grpc_address, option="--grpc-address"))
            http_address = self._config.http_address
            if http_address is not None:
                http_address = ports.enter_context(held_address(http_address, option="--http-address"))
            self._config = replace(self._config, grpc_address=grpc_address, http_address=http_address, share_port=True)
            async with asyncio.TaskGroup() as tasks:
                for number in range(1, self._config.workers + 1):
                    tasks.create_task(self._keep_running(number, stop), name=f"worker-{number}")
                await stop.wait()
                stop.clear()
                _log.info("stopping", grace_seconds=self._config.shutdown_grace)
                await self._stop(stop)
        _log.info("stopped")
        return int(self._failed)

    async def _keep_running(self, number: int, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            started = loop.time()
            try:
                status: int | str = await self._run_worker(number)
            except OSError as error:
                status = str(error)
            if self._stopping.is_set():
                return
            if number not in self._served:
                # Another would fail in the same way.
                _log.error("a worker has ended before it served", number=number, status=status)
                self._failed = True
                stop.set()
                return
            _log.error("a worker has ended, starting another", number=number, status=status)
            if loop.time() - started > _LASTING:
                pause = _FIRST_PAUSE
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_worker(self, number: int) -> int:
        """Start a worker, wait for its end, and return its status."""
        process = await asyncio.create_subprocess_exec(
            # -P: it imports nothing from the working directory, as the command `collab` does not.
            sys.executable, "-P", "-c", "from collab_service.cli.worker import main; main()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is for us to act on
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        self._processes[number] = process
        try:
            if self._stopping.is_set():
                process.terminate()
            order = Order(number, self._config, self._url, self._log_format, self._metrics_files)
            process.stdin.write(pickle.dumps(order))
            if await process.stdout.readline() == READY and number not in self._served:
                self._served.add(number)
                if len(self._served) == self._config.workers:
                    log_serving(
                        self._url,
                        self._config.grpc_address,
                        self._config.http_address,
                        workers=self._config.workers,
                    )
            status = await process.wait()
            process.stdin.close()
            with suppress(ConnectionError):  # it may have ended before it took its order
                await process.stdin.wait_closed()
            return status
        finally:
            self._metrics_files.forget_states_of(number)
            del self._processes[number]

    async def _stop(self, again: asyncio.Event) -> None:
        """Stop the workers: politely, and at once when told again or when they take too long."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        ended = asyncio.gather(*(process.wait() for process in self._processes.values()))
        told = asyncio.create_task(again.wait(), name="second-signal")
        await asyncio.wait(
            (ended, told), timeout=2 * self._config.shutdown_grace + _MARGIN, return_when=asyncio.FIRST_COMPLETED
        )
        if told.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait((ended,), timeout=_MARGIN)
        told.cancel()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)
