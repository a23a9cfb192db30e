"""The standard health service, following the state of the database."""

import asyncio
import time

import structlog
from grpc_health.v1 import health, health_pb2

from collab_service.metrics import DatabaseMetrics
from collab_service.model.errors import ReadOnlyServer, StorageUnavailable
from collab_service.storage.database import Pulse
from collab_service.storage.driver_errors import cause_of

_log = structlog.get_logger(__name__)

_INTERVAL = 0.5
_PATIENCE = 1.25
"""Seconds after which a database that does not answer is taken to be away; with the interval less than two."""
_SILENCE = 2.5
"""Seconds without an answer after which a connection may be one that leads nowhere; less is a slow answer."""
_GIVE_UP = 10.0
"""Seconds of silence after which nobody waits any more for answers to what was sent before."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthMonitor:
    """Feels the database's pulse, tells the health service, and has connections cut that lead nowhere any more.

    After a silence, nobody knows whether the connections from before it still have another end: a network that has lost
    them tells nobody. They are cut once the database answers again, or when the silence lasts. So are those to a server
    that takes no writes any more: with several hosts in the URL, another one may.
    """

    def __init__(self, pulse: Pulse, names: tuple[str, ...], metrics: DatabaseMetrics) -> None:
        """Prepare; nothing is serving until the first beat.

        Args:
            pulse: The database's.
            names: The names whose health is asked for; "" is that of the whole server.
            metrics: Where it is seen.
        """
        self.servicer = health.aio.HealthServicer()
        self._pulse = pulse
        self._names = names
        self._metrics = metrics
        self._serving: bool | None = None
        self._silent_since: float | None = None

    async def run(self) -> None:
        """Follow the database, for ever."""
        try:
            while True:
                await self.beat()
                await asyncio.sleep(_INTERVAL)
        finally:
            await self._pulse.close()

    async def beat(self) -> None:
        """Look once."""
        begun = time.monotonic()
        looking = asyncio.create_task(self._pulse.beat(), name="pulse")
        try:
            # Not cancelled when it takes too long: the driver would wait for the server even then.
            await asyncio.wait((looking,), timeout=_PATIENCE)
            if not looking.done():
                await self._tell(cause="no answer")
                await asyncio.wait((looking,), timeout=_SILENCE - _PATIENCE)
            if not looking.done():
                self._silent_since = self._silent_since or begun
                self._pulse.give_up()
            try:
                await looking
            except ReadOnlyServer as error:
                if self._serving:
                    self._pulse.leave(opened_before=time.monotonic())
                await self._tell(cause=cause_of(error))
            except StorageUnavailable as error:
                await self._tell(cause=cause_of(error))
            else:
                if self._serving:
                    self._leave_silent()
                await self._tell(cause=None)
            if self._silent_since is not None and time.monotonic() > self._silent_since + _GIVE_UP:
                self._leave_silent()
        finally:
            looking.cancel()

    def _leave_silent(self) -> None:
        """Cut what is left of the time before the last silence."""
        if self._silent_since is not None:
            self._pulse.leave(opened_before=self._silent_since)
            self._silent_since = None

    async def drain(self) -> None:
        """Say from now on that nothing is serving."""
        await self.servicer.enter_graceful_shutdown()

    async def _tell(self, cause: str | None) -> None:
        serving = cause is None
        if serving == self._serving:
            return
        self._serving = serving
        self._metrics.health(serving)
        for name in self._names:
            await self.servicer.set(name, _SERVING if serving else _NOT_SERVING)
        if serving:
            _log.info("the database is there")
        else:
            _log.error("the database is away", cause=cause)
