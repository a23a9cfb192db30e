"""`collab gateway`: the JSON gateway as a process of its own."""

import asyncio
import sys
from typing import Annotated

import typer

from collab_service.cli.connection import Target
from collab_service.cli.settings import (
    AllowUnauthenticated,
    CorsOrigins,
    LogFormatOption,
    MaxBodyBytes,
    MaxConnections,
    ShutdownGrace,
)
from collab_service.client import DEFAULT_TARGET
from collab_service.config import DEFAULT_HTTP_ADDRESS, DEFAULT_MAX_BODY_BYTES
from collab_service.logs import LogFormat
from collab_service.model.limits import DEFAULT_MAX_CONNECTIONS


def gateway(
    target: Target = DEFAULT_TARGET,
    http_address: Annotated[
        str,
        typer.Option(envvar="COLLAB_HTTP_ADDRESS", metavar="HOST:PORT", help="Where HTTP listens; port 0 picks one."),
    ] = DEFAULT_HTTP_ADDRESS,
    cors_origin: CorsOrigins = None,
    max_body_bytes: MaxBodyBytes = DEFAULT_MAX_BODY_BYTES,
    max_connections: MaxConnections = DEFAULT_MAX_CONNECTIONS,
    allow_unauthenticated: AllowUnauthenticated = False,
    log_format: LogFormatOption = LogFormat.AUTO,
    shutdown_grace: ShutdownGrace = 10.0,
) -> None:
    """Run the JSON gateway alone, until SIGTERM or Ctrl-C.

    `collab serve` has one of its own; this is for more of them, or for other machines. It can be started before the
    service, and is ready (`/readyz`) once that is.

    Example: `collab gateway --target collab.internal:50051 --http-address 127.0.0.1:8081`
    """
    # Imported only here, since it takes a while that no other command should wait for.
    from collab_service.cli import process
    from collab_service.cli.loop import new_event_loop
    from collab_service.gateway.server import GatewayConfig
    from collab_service.logs import configure_logs

    config = GatewayConfig(
        target=target,
        http_address=http_address,
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
    )
    with process.server_errors(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        process.check_reach("--http-address", http_address, allow_unauthenticated)
        configure_logs(log_format)
        sys.exit(runner.run(process.run_gateway(config, shutdown_grace)))
