"""The standard health service, following the state of the database."""

import asyncio

import structlog
from grpc_health.v1 import health, health_pb2

from collab_service.metrics import DatabaseMetrics
from collab_service.model.errors import StorageUnavailable
from collab_service.storage.database import Pulse
from collab_service.storage.driver_errors import cause_of

_log = structlog.get_logger(__name__)

_INTERVAL = 1.0
_PATIENCE = 2.0
"""Seconds after which a database that does not answer is taken to be away."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthMonitor:
    """Feels the database's pulse and tells the health service."""

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
        looking = asyncio.create_task(self._pulse.beat(), name="pulse")
        try:
            # Not cancelled when it takes too long: the driver would wait for the server even then.
            await asyncio.wait((looking,), timeout=_PATIENCE)
            if not looking.done():
                await self._tell(cause="no answer")
            try:
                await looking
            except StorageUnavailable as error:
                await self._tell(cause=cause_of(error))
            else:
                await self._tell(cause=None)
        finally:
            looking.cancel()

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
