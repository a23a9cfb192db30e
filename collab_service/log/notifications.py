"""Tells other processes that sessions have changed, and hears it from them.

A notification is a hint and never data: whoever gets one looks into the table. It is sent after the commit and in a
transaction of its own, because a transaction that notifies takes a lock of the whole PostgreSQL server at its commit
(https://www.postgresql.org/docs/18/sql-notify.html); and all that has changed within a few milliseconds is sent
together.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import structlog

from collab_service.metrics import FollowMetrics
from collab_service.model.errors import StorageUnavailable
from collab_service.storage.database import Database
from collab_service.storage.driver_errors import cause_of, driver_errors
from collab_service.storage.pipeline import PipelineConnection
from collab_service.storage.repository import notifying

_log = structlog.get_logger(__name__)

_INTERVAL, _INTERVAL_PER_EVENT, _LONGEST_INTERVAL = 0.003, 0.0003, 0.02
"""Seconds between two notifications: at least, more for each event that they tell of, and at most."""
_TURNS = 3
"""Turns of the event loop in which an answer gets from the commit to the wire."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
"""Seconds between attempts to connect."""
_LASTING = 1.0
"""Seconds after which a connection has worked, and the pauses begin anew."""


class Notifications:
    """Two connections of their own: one that listens, and one that notifies."""

    def __init__(
        self,
        database: Database,
        *,
        metrics: FollowMetrics,
        on_change: Callable[[Sequence[int]], None],
        on_listening: Callable[[], None],
    ) -> None:
        """Prepare; `listen` and `send` do the work.

        Args:
            database: Where to connect.
            metrics: Where notifications are counted.
            on_change: Called with the sessions that another process has changed.
            on_listening: Called each time when listening has begun: anything may have changed before.
        """
        self._database = database
        self._metrics = metrics
        self._on_change = on_change
        self._on_listening = on_listening
        self._changed: dict[int, None] = {}
        self._events = 0
        self._wake = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._sender_pid = 0
        self._wanted = asyncio.Event()

    def tell(self, session_id: int, events: int) -> None:
        """Let other processes know, soon, that a session has changed, by so many events."""
        self._changed[session_id] = None
        self._events += events
        self._wake.set()
        self._all_sent.clear()

    async def all_sent(self, seconds: float) -> None:
        """Wait until everything that was told has been sent, for so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_sent.wait()

    def want_to_hear(self) -> None:
        """Listen from now on; a process through which nobody follows has nothing to listen for."""
        self._wanted.set()

    async def listen(self) -> None:
        """Hear what other processes tell, for ever."""
        await self._wanted.wait()
        await _again_and_again(self._listen, "not listening to other processes, trying on")

    async def send(self) -> None:
        """Send what was told, for ever."""
        await _again_and_again(self._send, "other processes cannot be notified, trying on")

    async def _listen(self) -> None:
        async with await self._database.connect() as connection:
            await connection.set_autocommit(True)
            await notifying.listen(connection)
            self._on_listening()
            async for notification in connection.notifies():
                if notification.pid != self._sender_pid:
                    self._hear(notification.payload)

    async def _send(self) -> None:
        async with await PipelineConnection.open(self._database) as connection:
            await notifying.commit_without_flush(connection)
            self._sender_pid = connection.backend_pid
            try:
                while True:
                    await self._wake.wait()
                    for _ in range(_TURNS):  # those whose appends are answered go first
                        await asyncio.sleep(0)
                    events = self._events
                    await self._send_changed(connection)
                    await asyncio.sleep(min(_INTERVAL + _INTERVAL_PER_EVENT * events, _LONGEST_INTERVAL))
            finally:
                self._sender_pid = 0  # the number may be another's next

    async def _send_changed(self, connection: PipelineConnection) -> None:
        # Taken before it is sent: what changes from now on has to be told again.
        changed, self._changed, self._events = self._changed, {}, 0
        self._wake.clear()
        try:
            await notifying.notify(connection, changed)
        except BaseException:
            self._changed = changed | self._changed
            self._wake.set()
            raise
        self._metrics.notified()
        if not self._changed:
            self._all_sent.set()

    def _hear(self, payload: str) -> None:
        self._metrics.heard()
        session_ids = notifying.session_ids_of(payload)
        if session_ids is None:
            self._on_listening()
        else:
            self._on_change(session_ids)


async def _again_and_again(work: Callable[[], Awaitable[None]], trouble: str) -> None:
    """Do some work on a connection of its own, and again on another whenever that is lost, with growing pauses."""
    loop = asyncio.get_running_loop()
    pause = _FIRST_PAUSE
    while True:
        started = loop.time()
        try:
            with driver_errors():
                await work()
        except StorageUnavailable as error:
            _log.warning(trouble, cause=cause_of(error))
        except Exception as error:
            # Such as a server whose queue of notifications is full. Hints are nothing to go down for.
            _log.error(trouble, exc_info=error)
        if loop.time() - started > _LASTING:
            pause = _FIRST_PAUSE
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE)
