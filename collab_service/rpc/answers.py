"""Large answers on their way: grpc sends them once a call is carried out, and waits for ever for who takes nothing."""

import asyncio
import logging
from typing import Any, cast

import structlog

from collab_service.rpc.reads import Context
from collab_service.rpc.sockets import close_connections

_log = structlog.get_logger(__name__)

_LARGE = 16 * 1024
"""Bytes. Of smaller ones, as many as a process may have calls at once are nothing to speak of."""


def is_a_fault(record: logging.LogRecord) -> bool:
    """Tell whether what grpc wants to log is more than a client that has left while its answer was on its way."""
    return "ExecuteBatchError" not in record.getMessage()


class Answers:
    """The large answers of calls that have but one."""

    def __init__(self) -> None:
        self._sending: dict[Context, tuple[float, str]] = {}
        """Since when, by the loop's clock, and to which client: of a call that is over, grpc must not be asked."""
        self._loop = asyncio.get_running_loop()

    def sends(self, context: Context, size: int) -> None:
        """Take note that an answer of so many bytes is about to be sent."""
        if size >= _LARGE:
            self._sending[context] = self._loop.time(), context.peer()
            context.add_done_callback(cast(Any, self._sent))

    def end_slow(self, seconds: float) -> int:
        """Close the connections on which an answer was not taken for so many seconds, and return how many answers."""
        before = self._loop.time() - seconds
        slow = [peer for since, peer in self._sending.values() if since < before]
        for peer in close_connections(set(slow)):
            _log.warning("a client does not take its answers, its connection is closed", peer=peer)
        return len(slow)

    def _sent(self, context: Context) -> None:
        self._sending.pop(context, None)
