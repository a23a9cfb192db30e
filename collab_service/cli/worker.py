"""One of several processes that serve on one port, started by `workers`.

It gets its order through standard input, says through standard output when it serves, and stops when standard input
ends, which it does when the parent dies.
"""

import asyncio
import os
import pickle
import sys
from contextlib import suppress

import structlog

from collab_service.cli.failure import told_in_a_sentence
from collab_service.cli.loop import new_event_loop
from collab_service.cli.process import run_server, server_errors, stop_event
from collab_service.cli.workers import READY, Order
from collab_service.logs import configure_logs
from collab_service.metrics import Metrics

_log = structlog.get_logger(__name__)


async def _work(order: Order) -> int:
    stop = stop_event()
    loop = asyncio.get_running_loop()

    def parent_has_died() -> None:
        loop.remove_reader(sys.stdin.fileno())
        _log.warning("the parent process is gone")
        stop.set()

    def ready(address: str, http_address: str | None) -> None:
        _log.info("worker serving", grpc_address=address, http_address=http_address)
        with suppress(BrokenPipeError):  # the parent has died, which it hears in a moment
            os.write(sys.stdout.fileno(), READY)  # unbuffered: nothing is left for Python to complain about at its end

    loop.add_reader(sys.stdin.fileno(), parent_has_died)
    metrics = Metrics(order.metrics_files, order.number)
    return await run_server(order.config, order.url, metrics, stop, on_serving=ready)


def main() -> None:
    """Carry out the order."""
    try:
        order: Order = pickle.load(sys.stdin.buffer)
    except EOFError:  # the parent has died before it gave one
        sys.exit(1)
    configure_logs(order.log_format)
    structlog.contextvars.bind_contextvars(worker=order.number)
    with told_in_a_sentence(), server_errors(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        sys.exit(runner.run(_work(order)))
