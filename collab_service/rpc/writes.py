"""Messages on their way to readers, and the end of those that are not taken.

They are looked at all together, again and again: a timer for each would cost a tenth of what sending it does.
"""

import asyncio
from collections.abc import Callable

from msgspec import Struct

from collab_service.metrics import RpcMetrics
from collab_service.model.errors import ReaderStalled, ShuttingDown
from collab_service.rpc.reads import Context
from collab_service.rpc.stuck import StuckMessages

_STALLED = 60.0
"""Seconds after which a reader that takes no message is ended."""
_STALLED_WHEN_FULL = 1.0
"""The same, while so much is on its way to readers that nothing more is read."""
_LAST_MESSAGE = 1.0
"""Seconds that a follower gets to take its last message when the server stops."""
_LOOK = 0.25
"""Seconds between two looks."""


async def begin(context: Context) -> None:
    """Send what comes before a stream's first message, so that the stream can be ended while that is not taken.

    It would travel with the message, and until that is taken grpc.aio believes that it is still to be sent: ending the
    call then sends it again, which fails, and the reader is told nothing and waits for ever.
    """
    await context.send_initial_metadata(())


class _Write(Struct, eq=False):
    """A message on its way."""

    task: "asyncio.Task[object]"
    since: float
    follow: bool
    is_ended: bool = False

    def end(self) -> None:
        """Interrupt it."""
        self.is_ended = True
        self.task.cancel()

    def was_only_ended(self) -> bool:
        """Tell, once its task was cancelled, whether that was `end` and nobody else; if so, it is no longer."""
        return self.is_ended and self.task.uncancel() == 0


class Writes:
    """All messages on their way from this process to readers."""

    def __init__(self, metrics: RpcMetrics, is_full: Callable[[], bool]) -> None:
        """Prepare; `run` ends what is not taken.

        Args:
            metrics: Where messages are counted.
            is_full: Tells whether so much is on its way that nothing more is read.
        """
        self._metrics = metrics
        self._is_full = is_full
        self._under_way: set[_Write] = set()
        self._stuck = StuckMessages()
        self._stopping_since: float | None = None
        self._loop = asyncio.get_running_loop()

    async def write(self, message: bytes, context: Context, *, follow: bool) -> None:
        """Send a message to a reader.

        Raises:
            ReaderStalled: It was not taken for too long.
            ShuttingDown: It was not taken, and the server stops.
        """
        task = asyncio.current_task()
        assert task is not None
        write = _Write(task, self._loop.time(), follow)
        self._under_way.add(write)
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if not write.was_only_ended():
                raise
            self._stuck.add(context, len(message))
            raise ShuttingDown if follow and self._stopping_since is not None else ReaderStalled from None
        finally:
            self._under_way.discard(write)
        self._metrics.sent(len(message), follow=follow)

    def stop(self) -> None:
        """End follows whose reader takes no message, shortly."""
        self._stopping_since = self._loop.time()

    async def run(self) -> None:
        """End those that are not taken, for ever."""
        while True:
            await asyncio.sleep(_LOOK)
            now = self._loop.time()
            patience = _STALLED_WHEN_FULL if self._is_full() else _STALLED
            for write in self._under_way:
                end = write.since + patience
                if self._stopping_since is not None and write.follow:
                    end = min(end, max(write.since, self._stopping_since) + _LAST_MESSAGE)
                if now >= end and not write.is_ended:
                    write.end()
