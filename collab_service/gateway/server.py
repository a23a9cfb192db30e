"""The gateway's HTTP server: what it listens on, and the order in which it stops."""

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import structlog
import uvicorn

from collab_service.addresses import join_address, listening_socket, split_address
from collab_service.client import CollabClient, RetryPolicy
from collab_service.gateway.app import Gateway, Metrics
from collab_service.gateway.protocol import Connections, Protocol
from collab_service.gateway.streams import FOLLOWS

_log = structlog.get_logger(__name__)

OPTION = "--http-address"
_LINGER = 0.5
"""Seconds to be not ready before the port closes, so that load balancers send nothing new."""
_FLUSH = 0.5
"""Seconds for the last answers to get out."""
_KEEP_ALIVE = 75
"""Seconds that a silent connection is kept: longer than load balancers do, who must be the ones to close it."""
_PAGES = 32
"""Pages of events on their way to clients at once: a page may be 1 MiB, and is held in several forms."""
_CHANNEL_OPTIONS = (("grpc.http2.bdp_probe", 0),)
"""Of a page that nobody has asked for yet no more than 64 KiB may come, however fast others are read."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How to run a gateway."""

    target: str
    """The service's gRPC address."""
    http_address: str = "127.0.0.1:8080"
    share_port: bool = False
    """Let other processes of ours listen on the same port."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may call from a browser."""
    max_body_bytes: int = 8 * 1024 * 1024
    max_connections: int = 10_000
    """Connections at once."""


class GatewayServer:
    """One process's gateway."""

    def __init__(self, config: GatewayConfig, *, metrics: Metrics, on_death: Callable[[], None]) -> None:
        """Prepare; `start` opens the port.

        Args:
            config: The settings.
            metrics: Counts the requests, and answers what is at `/metrics`.
            on_death: Called when it has ended without being told to, after which the process has to go.
        """
        self._config = config
        self._on_death = on_death
        # One attempt: whoever calls is told what went wrong, and decides.
        self._client = CollabClient(config.target, retry=RetryPolicy(attempts=1), options=_CHANNEL_OPTIONS)
        turns = asyncio.Semaphore(_PAGES)
        self._gateway = Gateway(
            self._client,
            metrics,
            cors_origins=config.cors_origins,
            max_body_bytes=config.max_body_bytes,
            turns=turns,
        )
        # Ours is the log: uvicorn's has a line for every client that leaves and every answer that is cut off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._gateway.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http=cast(Any, partial(Protocol, Connections(config.max_connections, turns))),
                ws="none",
                server_header=False,
                proxy_headers=False,  # nothing here depends on who calls
                timeout_keep_alive=_KEEP_ALIVE,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Open the port and return the address, with the port that was chosen where it was 0.

        Raises:
            AddressError: It cannot be listened on.
        """
        listener = listening_socket(self._config.http_address, share=self._config.share_port, option=OPTION)
        port = listener.getsockname()[1]
        await self._client.__aenter__()
        self._serving = asyncio.create_task(self._uvicorn.serve([listener]), name="gateway")
        self._serving.add_done_callback(self._ended)
        await self._uvicorn.is_started.wait()
        host, _ = split_address(self._config.http_address)
        return join_address(host, port)

    async def stop(self, grace: float) -> None:
        """Stop in order: not ready, follows end, what is in progress finishes in `grace` seconds, the port closes."""
        if self._serving is None:
            return
        self._gateway.drain()
        if self._uvicorn.should_exit:  # it was told before, and given more time
            await self._cut_off()
        await asyncio.sleep(min(_LINGER, grace))
        for connection in list(self._uvicorn.server_state.connections):
            if isinstance(connection, Protocol) and connection.is_answering and connection.scope["state"].get(FOLLOWS):
                connection.transport.abort()  # it has not taken the end of what it follows, as a page that sleeps
        self._uvicorn.config.timeout_graceful_shutdown = math.ceil(grace)
        self._uvicorn.should_exit = True
        await asyncio.wait((self._serving,))
        if self._uvicorn.server_state.connections:  # what was not done is cancelled, and tells its client so
            await asyncio.sleep(min(_FLUSH, grace))
        await self._cut_off()
        await self._client.__aexit__()

    async def _cut_off(self) -> None:
        """End what is in progress, and let go of clients that take nothing."""
        for connection in list(self._uvicorn.server_state.connections):
            connection.transport.abort()
        tasks = set(self._uvicorn.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_FLUSH)

    def _ended(self, serving: asyncio.Task[None]) -> None:
        self._uvicorn.is_started.set()
        if not self._uvicorn.should_exit:
            _log.error("the gateway has died", exc_info=None if serving.cancelled() else serving.exception())
            self._on_death()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which leaves the signals to us and tells when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_started = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # as uvicorn has it
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_started.set()
