"""The life of a process that serves: it starts, works until it is told to stop, and stops in order."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import structlog

from collab_service import __version__
from collab_service.addresses import AddressError, is_loopback, join_address, split_address
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.files import connections_that_fit
from collab_service.config import Config
from collab_service.gateway.server import GatewayConfig, GatewayServer
from collab_service.metrics import GatewayMetrics, Metrics, ServiceMetrics
from collab_service.model.errors import CollabError
from collab_service.rpc.server import Server
from collab_service.storage.database import place_of

_log = structlog.get_logger(__name__)

_NEW_OBJECTS = 10_000
"""New objects from which on the garbage collector looks through them for cycles. Python's own 700 are those of a few
calls in progress: where there are more, it looks through them again and again, and finds nothing."""
_AT_ONCE = 2.0
"""Seconds in which everything is let go of when there is no grace."""


@contextlib.contextmanager
def server_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn the errors that a process that serves may end with, and `more`, into `CommandError`."""
    errors: tuple[type[Exception], ...] = (AddressError, CollabError, *more)
    try:
        yield
    except errors as error:
        raise CommandError(str(error)) from error


def check_reach(option: str, address: str, allow_unauthenticated: bool) -> None:
    """Raise `CommandError` when it is no address, or other machines reach it and nobody has allowed that."""
    try:
        host, _ = split_address(address)
    except AddressError as error:
        raise CommandError(f"{option}: {error}", ExitStatus.USAGE) from error
    if not is_loopback(host) and not allow_unauthenticated:
        raise CommandError(
            f"{option} {address} can be reached from other machines, and there is no authentication yet; "
            "use 127.0.0.1, or add --allow-unauthenticated if everybody who gets there may read and write",
            ExitStatus.USAGE,
        )


def stop_signals() -> list[signal.Signals]:
    """Return what tells a process to stop: Ctrl-C, SIGTERM, and the end of its terminal unless `nohup` ignores that."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def stop_event() -> asyncio.Event:
    """Return an event that the `stop_signals` set, for the running loop."""
    stop = asyncio.Event()
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def run_server(
    config: Config, url: str, metrics: Metrics, stop: asyncio.Event, *, on_serving: Callable[[str, str | None], None]
) -> int:
    """Serve until told to stop; told again, stop at once.

    Args:
        config: The settings.
        url: The database; its schema must be there.
        metrics: The process's.
        stop: What tells.
        on_serving: Called with the addresses once the ports are open; the gateway's is None where there is none.

    Returns:
        The exit status: 1 when a part of the server has died.
    """
    config = replace(config, max_connections=connections_that_fit(config.max_connections, config.database_pool_size))
    life = _Life(stop, config.shutdown_grace)
    server = Server(config, url, metrics=ServiceMetrics(metrics), on_death=life.died)
    gateway_metrics = GatewayMetrics(metrics)
    gateway: GatewayServer | None = None

    async def start() -> None:
        nonlocal gateway
        address, http_address = await server.start(), None
        if config.http_address is not None:
            gateway = GatewayServer(
                _gateway_config(config, config.http_address, address),
                metrics=gateway_metrics,
                on_death=life.died,
            )
            http_address = await gateway.start()
        on_serving(address, http_address)

    async def end(grace: float) -> None:
        if gateway is not None:  # it needs the service for what is in progress
            await gateway.stop(grace)
        await server.stop(grace)

    return await life.run(start, end)


async def run_gateway(config: GatewayConfig, grace: float) -> int:
    """Run a gateway alone until SIGTERM or Ctrl-C; told again, stop at once. Return the exit status.

    Args:
        config: The settings.
        grace: Seconds that requests in progress get to finish.
    """
    config = replace(config, max_connections=connections_that_fit(config.max_connections))
    life = _Life(stop_event(), grace)
    gateway = GatewayServer(config, metrics=GatewayMetrics(Metrics()), on_death=life.died)

    async def start() -> None:
        address = await gateway.start()
        _log.info("serving", http_address=address, target=config.target, version=__version__, pid=os.getpid())

    return await life.run(start, gateway.stop)


class _Life:
    """From the start to the end of a process that serves."""

    def __init__(self, stop: asyncio.Event, grace: float) -> None:
        self._stop = stop
        self._grace = grace
        self._status = 0

    def died(self) -> None:
        """End, since a part has died."""
        self._status = 1
        self._stop.set()

    async def run(self, start: Callable[[], Awaitable[None]], end: Callable[[float], Coroutine[Any, Any, None]]) -> int:
        """Start, wait until told to stop, and end; told again, end at once. Return the exit status.

        Args:
            start: Opens the ports.
            end: Stops in order, within so many seconds of grace; may be called again while it does.
        """
        _let_others_finish()
        try:
            await start()
            # What the imports have made stays for good. Left to the garbage collector, looking through it stops the
            # whole process for 30 to 40 ms, every few seconds.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_NEW_OBJECTS)
            await self._stop.wait()
            self._stop.clear()
            _log.info("stopping", grace_seconds=self._grace)
        finally:
            stopping = asyncio.create_task(end(self._grace), name="stop")
            again = asyncio.create_task(self._stop.wait(), name="second-signal")
            await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
            if not stopping.done():
                _log.warning("stopping at once, as the second signal says")
                stopping.cancel()
                await asyncio.wait((stopping,))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_AT_ONCE):
                        await end(0)
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
        _log.info("stopped")
        return self._status


def _let_others_finish() -> None:
    """Have the kernel not interrupt other processes when threads of this one wake up (SCHED_BATCH, see sched(7)).

    A call wakes them several times, from the socket to the event loop and back. Where all cores are busy, the database
    and other workers were interrupted each time: two processes on two cores answered a tenth fewer appends.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _gateway_config(config: Config, http_address: str, grpc_address: str) -> GatewayConfig:
    host, port = split_address(grpc_address)
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return GatewayConfig(
        target=join_address(everywhere.get(host, host), port),
        http_address=http_address,
        share_port=config.share_port,
        cors_origins=config.cors_origins,
        max_body_bytes=config.max_body_bytes,
        max_connections=config.max_connections,
    )


def log_serving(url: str, address: str, http_address: str | None, **more: int) -> None:
    """Tell the log that calls are taken from now on, where, and which database keeps what they bring."""
    _log.info(
        "serving",
        grpc_address=address,
        http_address=http_address,
        database=place_of(url),
        version=__version__,
        pid=os.getpid(),
        **more,
    )
