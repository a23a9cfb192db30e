"""`collab serve`: its options."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.settings import (
    AllowUnauthenticated,
    CorsOrigins,
    DatabaseUrl,
    LogFormatOption,
    MaxBodyBytes,
    MaxConnections,
    ShutdownGrace,
    default_data_dir,
)
from collab_service.config import DEFAULT_HTTP_ADDRESS, DEFAULT_MAX_BODY_BYTES, Config
from collab_service.logs import LogFormat
from collab_service.model import Limits, QueueLimits
from collab_service.model.limits import (
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_MAX_FOLLOWERS,
    DEFAULT_MAX_MEMORY_BYTES,
    MAX_INT64,
)

_MAX_WORKERS = 256

_LIMITS, _QUEUE = Limits(), QueueLimits()
_MAX_INDEXED = 2_000
"""Bytes that an entry of PostgreSQL's indexes certainly holds."""


def _limit(name: str, help_: str, most: int = 2**31 - 1) -> Any:
    variable = f"COLLAB_{name.upper().replace('-', '_')}"
    return typer.Option(f"--{name}", envvar=variable, min=1, max=most, help=help_, rich_help_panel="Limits")


def serve(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="COLLAB_DATA_DIR",
            metavar="DIRECTORY",
            help="Where the PostgreSQL of our own keeps its data; used when no database URL is given.",
            show_default="/var/lib/collab-service for root, else ~/.local/share/collab-service",
        ),
    ] = None,
    database_url: DatabaseUrl = None,
    grpc_address: Annotated[
        str,
        typer.Option(envvar="COLLAB_GRPC_ADDRESS", metavar="HOST:PORT", help="Where gRPC listens; port 0 picks one."),
    ] = "127.0.0.1:50051",
    http_address: Annotated[
        str | None,
        typer.Option(
            envvar="COLLAB_HTTP_ADDRESS",
            metavar="HOST:PORT|off",
            help="Where the JSON gateway listens; port 0 picks one, off starts none.",
            show_default=f"{DEFAULT_HTTP_ADDRESS}, where it is free",
        ),
    ] = None,
    cors_origin: CorsOrigins = None,
    workers: Annotated[
        str,
        typer.Option(
            envvar="COLLAB_WORKERS",
            metavar="N|auto",
            help="Processes that serve on the one port; auto: one for each core.",
        ),
    ] = "1",
    allow_unauthenticated: AllowUnauthenticated = False,
    log_format: LogFormatOption = LogFormat.AUTO,
    shutdown_grace: ShutdownGrace = 10.0,
    database_pool_size: Annotated[
        int,
        typer.Option(
            envvar="COLLAB_DATABASE_POOL_SIZE",
            min=2,
            help="Connections for all but appending, live follows and health, which have eleven.",
        ),
    ] = 10,
    notify: Annotated[
        bool,
        typer.Option(
            envvar="COLLAB_NOTIFY",
            help="Tell other servers of appends with PostgreSQL's NOTIFY. Without it, behind a pooler that has no "
            "LISTEN, what others write reaches followers up to two seconds later.",
        ),
    ] = True,
    keepalive: Annotated[
        float,
        typer.Option(
            envvar="COLLAB_KEEPALIVE",
            metavar="SECONDS",
            min=1,
            max=7200,
            help="Silence after which a client is asked for a sign of life; it has a third of that to give one.",
        ),
    ] = 30.0,
    max_body_bytes: MaxBodyBytes = DEFAULT_MAX_BODY_BYTES,
    max_event_bytes: Annotated[int, _limit("max-event-bytes", "The payload of an event.")] = _LIMITS.event_bytes,
    max_batch_events: Annotated[int, _limit("max-batch-events", "Events in a batch.")] = _LIMITS.batch_events,
    max_batch_bytes: Annotated[
        int, _limit("max-batch-bytes", "The payloads of a batch together.")
    ] = _LIMITS.batch_bytes,
    max_text_bytes: Annotated[
        int, _limit("max-text-bytes", "room, owner_id, actor_id, type, hash and idempotency_key.", _MAX_INDEXED)
    ] = _LIMITS.text_bytes,
    max_signature_bytes: Annotated[
        int, _limit("max-signature-bytes", "The signature of an event.")
    ] = _LIMITS.signature_bytes,
    max_message_bytes: Annotated[int, _limit("max-message-bytes", "A received gRPC message.")] = _LIMITS.message_bytes,
    max_connections: MaxConnections = DEFAULT_MAX_CONNECTIONS,
    max_followers: Annotated[
        int, _limit("max-followers", "Follows at once in a process; further ones are answered TOO_MANY_FOLLOWERS.")
    ] = DEFAULT_MAX_FOLLOWERS,
    max_memory_bytes: Annotated[
        int,
        _limit("max-memory-bytes", "Memory of a process; beyond, calls that wait for clients are ended.", MAX_INT64),
    ] = DEFAULT_MAX_MEMORY_BYTES,
    max_waiting_appends: Annotated[
        int, _limit("max-waiting-appends", "Appends that wait or are being written; one session gets half.")
    ] = _QUEUE.requests,
    max_waiting_bytes: Annotated[
        int, _limit("max-waiting-bytes", "The payloads of those; one session gets a quarter.")
    ] = _QUEUE.bytes,
    max_transaction_sessions: Annotated[
        int, _limit("max-transaction-sessions", "Sessions that one append transaction may span.")
    ] = _QUEUE.transaction_sessions,
) -> None:
    """Run the service, until SIGTERM or Ctrl-C.

    Without a database URL it keeps a PostgreSQL of its own in the data directory: made on the first start, migrated on
    every start, stopped with the service. With one, the schema must be there: `collab migrate`.

    Every option can be given as the environment variable that stands with it.

    Examples:

    * `collab serve`

    * `collab serve --database-url postgresql://collab@db.internal/collab --log-format json`
    """
    config = Config(
        data_dir=data_dir or default_data_dir(),
        database_url=database_url or None,
        database_pool_size=database_pool_size,
        grpc_address=grpc_address,
        http_address=None if http_address == "off" else http_address or DEFAULT_HTTP_ADDRESS,
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_bytes,
        workers=_workers(workers),
        shutdown_grace=shutdown_grace,
        keepalive=keepalive,
        max_connections=max_connections,
        max_followers=max_followers,
        max_memory_bytes=max_memory_bytes,
        notify=notify,
        limits=Limits(
            event_bytes=max_event_bytes,
            batch_events=max_batch_events,
            batch_bytes=max_batch_bytes,
            text_bytes=max_text_bytes,
            signature_bytes=max_signature_bytes,
            message_bytes=max_message_bytes,
        ),
        queue=QueueLimits(
            requests=max_waiting_appends,
            bytes=max_waiting_bytes,
            session_requests=max(max_waiting_appends // 2, 1),
            session_bytes=max(max_waiting_bytes // 4, 1),
            transaction_sessions=max_transaction_sessions,
        ),
    )
    # Imported only here, since it takes half a second that no other command should wait for.
    from collab_service.cli import serving

    sys.exit(
        serving.run(
            config,
            log_format,
            allow_unauthenticated=allow_unauthenticated,
            # An upgrade must not end where another program has the port that nobody chose.
            http_if_free=http_address is None,
        )
    )


def _workers(text: str) -> int:
    if text == "auto":
        return min(_cores(), _MAX_WORKERS)
    if text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= _MAX_WORKERS:
        return int(text)
    raise CommandError(
        f"--workers {text} is not possible; it is a number from 1 to {_MAX_WORKERS}, or auto", ExitStatus.USAGE
    )


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
