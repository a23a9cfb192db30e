"""The gRPC server: what it listens on, what it offers, and the order in which it stops."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from collab_service.addresses import cannot_listen, free_place, join_address, split_address
from collab_service.config import Config
from collab_service.log.background import BackgroundTasks
from collab_service.log.service import LogService
from collab_service.metrics import ServiceMetrics
from collab_service.rpc.answers import is_a_fault
from collab_service.rpc.boundary import Boundary
from collab_service.rpc.health import HealthMonitor
from collab_service.rpc.memory_bound import MemoryBound
from collab_service.rpc.reads import Reads
from collab_service.rpc.servicer import Servicer
from collab_service.rpc.standard import standard_handlers
from collab_service.v1 import collab_service_pb2 as pb

_log = structlog.get_logger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["CollabService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

_OPTION = "--grpc-address"
_LINGER = 0.45
"""Seconds to go on refusing new calls before the port closes."""
_LONGEST_HOLD = 0.5
"""Seconds at most to hold refusals back before that."""
_PENDING_CALLS = 20_000
_HANDSHAKE = 10.0
"""Seconds for a new connection to become one of HTTP/2."""
_FLUSH = 1.0
"""Seconds for the last answers to get out, once the calls are done."""


class Server:
    """One process's service: the log, gRPC in front of it, and health beside it."""

    def __init__(
        self, config: Config, database_url: str, *, metrics: ServiceMetrics, on_death: Callable[[], None]
    ) -> None:
        """Prepare; `start` opens the port.

        Args:
            config: The settings.
            database_url: The database; its schema must be there.
            metrics: Where it is seen how it fares.
            on_death: Called when a part of the server has died, after which the process has to go.
        """
        self._config = config
        self._metrics = metrics
        self._service = LogService(config, database_url, metrics=metrics, on_death=on_death)
        self._health = HealthMonitor(self._service.pulse(), ("", SERVICE.full_name), metrics.database)
        self._tasks = BackgroundTasks(on_death)
        self._servicer = Servicer(self._service, config.limits, metrics.rpcs)
        self._boundary = Boundary(metrics.rpcs)
        self._standard_reads = Reads()
        self._memory = MemoryBound(config.max_memory_bytes, (*self._boundary.bounded, self._standard_reads))
        self._grpc: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Open the port and return the address, with the port that was chosen where it was 0.

        Raises:
            AddressError: It cannot be listened on.
        """
        logging.getLogger("grpc._cython.cygrpc").addFilter(is_a_fault)
        self._grpc = self._make_grpc_server()
        self._service.start()
        await self._health.beat()
        self._tasks.spawn(self._health.run(), "health")
        self._tasks.spawn(self._metrics.of_process.run(), "metrics")
        self._tasks.spawn(self._servicer.writes.run(), "stalled readers")
        self._tasks.spawn(self._memory.run(), "memory")
        host, port = split_address(self._config.grpc_address)
        if not self._config.share_port:
            free_place(self._config.grpc_address, option=_OPTION)
        try:
            bound = self._grpc.add_insecure_port(join_address(host, port))
        except RuntimeError as error:
            raise cannot_listen(self._config.grpc_address, option=_OPTION) from error
        await self._grpc.start()
        return join_address(host, bound)

    async def stop(self, grace: float) -> None:
        """Stop so that nothing acknowledged is lost, and nothing in progress cut within `grace` seconds."""
        # 1. Not ready: load balancers send nothing new.
        await self._health.drain()
        # 2. Streams end, new calls are refused with a reason, and those in progress finish. That goes on for a moment
        # before the port closes, in which load balancers hear of it.
        self._servicer.stop_streams()
        try:
            async with asyncio.timeout(grace):
                await self._boundary.drain()
                await asyncio.sleep(_LINGER)
        except TimeoutError:
            _log.warning("the grace period is over", grace_seconds=grace)
        # 3. The port closes, and clients are told to go elsewhere. Calls that have arrived by then but not begun grpc
        # cancels, and tells nobody why. So the last refusals are held back until that has been said: whoever waits for
        # one makes no new call. Streams that only watch (health, reflection) are not waited for.
        if self._grpc is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LONGEST_HOLD, grace)):
                    await self._boundary.hold_refusals_back()
            stopping = asyncio.create_task(self._grpc.stop(min(_FLUSH, grace)), name="stop-grpc")
            await asyncio.sleep(0)  # in which it begins to
            self._boundary.let_refusals_go()
            await stopping
        await self._tasks.cancel()
        # 4. The sequencer writes what waits; then the pool closes.
        await self._service.stop(grace)

    def _make_grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                # A port that another process listens on is an error, not something to share by accident.
                ("grpc.so_reuseport", int(self._config.share_port)),
                ("grpc.max_receive_message_length", self._config.limits.message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.absolute_max_metadata_size", 32 * 1024),
                ("grpc.max_allowed_incoming_connections", self._config.max_connections),
                ("grpc.server_handshake_timeout_ms", int(_HANDSHAKE * 1000)),
                ("grpc.max_concurrent_streams", 4_096),
                # A window that grows with the rate holds megabytes for each call, also for those that are refused. One
                # of 64 KiB is no brake on a large message: it is extended for the one that is being received.
                ("grpc.http2.bdp_probe", 0),
                # Calls that have arrived and not begun: after a restart every follower comes back at once. grpc itself
                # would turn some away from a thousand on, without a reason.
                ("grpc.server.max_pending_requests", _PENDING_CALLS),
                ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING_CALLS),
                # Load balancers drop connections that are silent for as little as a minute, and a client that has
                # vanished says nothing. So the server pings after half a minute (unless configured), waits a third of
                # that for an answer, and lets clients ping as often as every five seconds, also between calls.
                ("grpc.keepalive_time_ms", int(self._config.keepalive * 1000)),
                ("grpc.keepalive_timeout_ms", int(self._config.keepalive * 1000 / 3)),
                # The time for an answer is a minute otherwise, where the client's system still acknowledges packets.
                ("grpc.http2.ping_timeout_ms", int(self._config.keepalive * 1000 / 3)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ]
        )
        looks = dict.fromkeys(("AppendEvent", "AppendEvents"), self._servicer.look_at)
        handlers = self._boundary.handlers(SERVICE, self._servicer, looks=looks)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        # What comes by the thousand waits in queues of its own, so that nothing else waits behind it: grpc has one for
        # each method that is registered, and one for the rest.
        registered = {name: handlers[name] for name in (*looks, "ListEvents")}
        server.add_registered_method_handlers(SERVICE.full_name, registered)
        names = (SERVICE.full_name, _HEALTH.full_name, _REFLECTION.full_name)
        for service, servicer in (
            (_HEALTH, self._health.servicer),
            (_REFLECTION, reflection.aio.ReflectionServicer(names)),
        ):
            handlers = standard_handlers(service, servicer, self._standard_reads)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        return server
