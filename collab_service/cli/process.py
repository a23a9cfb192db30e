"""The life of a process that serves: it starts, works until it is told to stop, and stops in order."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Callable

import structlog

from collab_service import __version__
from collab_service.config import Config
from collab_service.rpc.server import Server

_log = structlog.get_logger(__name__)


def stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and Ctrl-C set, for the running loop."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def run_server(config: Config, url: str, stop: asyncio.Event, *, on_serving: Callable[[str], None]) -> int:
    """Serve until told to stop; told again, stop at once.

    Args:
        config: The settings.
        url: The database; its schema must be there.
        stop: What tells.
        on_serving: Called with the address once the port is open.

    Returns:
        The exit status: 1 when a part of the server has died.
    """
    status = 0

    def died() -> None:
        nonlocal status
        status = 1
        stop.set()

    server = Server(config, url, on_death=died)
    try:
        address = await server.start()
        # What the imports have made stays for good. Left to the garbage collector, looking through it stops the whole
        # process for 30 to 40 ms, every few seconds.
        gc.collect()
        gc.freeze()
        on_serving(address)
        await stop.wait()
        stop.clear()
        _log.info("stopping", grace_seconds=config.shutdown_grace)
    finally:
        stopping = asyncio.create_task(server.stop(config.shutdown_grace), name="stop")
        again = asyncio.create_task(stop.wait(), name="second-signal")
        await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not stopping.done():
            _log.warning("stopping at once, as the second signal says")
            stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
    _log.info("stopped")
    return status


def log_serving(address: str, **more: int) -> None:
    """Tell the log that calls are taken from now on."""
    _log.info("serving", grpc_address=address, version=__version__, pid=os.getpid(), **more)
