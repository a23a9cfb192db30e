"""`collab serve`."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from collab_service.cli.failure import CommandError
from collab_service.cli.migrate import check_database_url
from collab_service.cli.process import log_serving, new_event_loop, run_server, stop_event
from collab_service.cli.settings import DatabaseUrl, default_data_dir
from collab_service.cli.workers import Workers
from collab_service.config import Config
from collab_service.log.background import BackgroundTasks
from collab_service.logs import LogFormat, configure_logs
from collab_service.model import Limits, QueueLimits
from collab_service.model.errors import StorageUnavailable
from collab_service.model.limits import DEFAULT_MAX_FOLLOWERS
from collab_service.rpc.server import is_loopback, split_address
from collab_service.storage import schema
from collab_service.storage.driver_errors import cause_of
from collab_service.storage.embedded import Cluster, DataDirectory, EmbeddedError
from collab_service.storage.embedded.accounts import postgres_account
from collab_service.storage.schema import SchemaState

_log = structlog.get_logger(__name__)

_DATABASE_LOOK = 1.0
"""Seconds between looks for a database that is not there when the server starts."""
_POSTGRES_LOOK = 1.0
"""Seconds between looks for the PostgreSQL of our own, which is started again when it has died."""

_OTHER_CONNECTIONS = 11
"""Of a process besides its pool: six to append, two for tails, two for notifications, one for its health."""
_SPARE_CONNECTIONS = 20
"""For people who look into the database."""
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
        str,
        typer.Option(
            envvar="COLLAB_HTTP_ADDRESS",
            metavar="HOST:PORT",
            help="Where the JSON gateway will listen; checked now, used by a later version.",
        ),
    ] = "127.0.0.1:8080",
    workers: Annotated[
        str,
        typer.Option(
            envvar="COLLAB_WORKERS",
            metavar="N|auto",
            help="Processes that serve on the one port; auto: one for each core.",
        ),
    ] = "1",
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated",
            envvar="COLLAB_ALLOW_UNAUTHENTICATED",
            help="Listen on addresses that other machines reach, although anybody there can then read and write.",
        ),
    ] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="COLLAB_LOG_FORMAT", help="Log lines for people or machines; auto asks the terminal."),
    ] = LogFormat.AUTO,
    shutdown_grace: Annotated[
        float,
        typer.Option(
            envvar="COLLAB_SHUTDOWN_GRACE",
            metavar="SECONDS",
            min=0,
            help="How long calls in progress may finish on a stop.",
        ),
    ] = 10.0,
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
    max_followers: Annotated[
        int, _limit("max-followers", "Follows at once in a process; further ones are answered TOO_MANY_FOLLOWERS.")
    ] = DEFAULT_MAX_FOLLOWERS,
    max_waiting_appends: Annotated[
        int, _limit("max-waiting-appends", "Appends that wait to be written; one session gets half.")
    ] = _QUEUE.requests,
    max_waiting_bytes: Annotated[
        int, _limit("max-waiting-bytes", "The payloads that wait; one session gets a quarter.")
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
    for option, address in (("--grpc-address", grpc_address), ("--http-address", http_address)):
        host, _ = split_address(address)
        if not is_loopback(host) and not allow_unauthenticated:
            raise CommandError(
                f"{option} {address} can be reached from other machines, and there is no authentication yet; "
                "use 127.0.0.1, or add --allow-unauthenticated if everybody who gets there may read and write"
            )
    config = Config(
        data_dir=data_dir or default_data_dir(),
        database_url=database_url or None,
        database_pool_size=database_pool_size,
        grpc_address=grpc_address,
        http_address=http_address,
        workers=_workers(workers),
        shutdown_grace=shutdown_grace,
        keepalive=keepalive,
        max_followers=max_followers,
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
    if config.database_url is not None:
        check_database_url(config.database_url)
    configure_logs(log_format)
    sys.exit(_run(config, log_format))


def _workers(text: str) -> int:
    if text == "auto":
        return min(_cores(), _MAX_WORKERS)
    if text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= _MAX_WORKERS:
        return int(text)
    raise CommandError(f"--workers {text} is not possible; it is a number from 1 to {_MAX_WORKERS}, or auto")


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Stopped(BaseException):
    """SIGTERM came while nothing was running yet."""


def _run(config: Config, log_format: LogFormat) -> int:
    def stop_starting(*_: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop_starting)
    try:
        # A parent of workers has little to do but to watch processes, at which asyncio's own loop is the more robust.
        loop_factory = new_event_loop if config.workers == 1 else None
        with _database(config) as (url, cluster), asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(config, url, cluster, log_format))
    except (_Stopped, KeyboardInterrupt):
        return 0


@contextmanager
def _database(config: Config) -> Iterator[tuple[str, Cluster | None]]:
    """Provide a database: the configured one, or a PostgreSQL of our own that runs and is migrated."""
    if config.database_url is not None:
        yield config.database_url, None
        return
    account = postgres_account()
    if account is None:
        raise CommandError(
            "PostgreSQL runs as a user that this machine knows by name and that is not root; there is none "
            "(for root: postgres or nobody). Start collab as another user, or give a database with --database-url"
        )
    data = DataDirectory(config.data_dir, account)
    try:
        cluster = Cluster(data)
        try:
            _start(cluster, config)
            _log.info("postgres started", data_dir=str(data.path), user=account.name)
            schema.migrate(cluster.url)
            yield cluster.url, cluster
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the end is near; it must be a clean one
            cluster.stop()
            _log.info("postgres stopped")
    finally:
        data.release()


def _start(cluster: Cluster, config: Config) -> None:
    needed = config.workers * (config.database_pool_size + _OTHER_CONNECTIONS) + _SPARE_CONNECTIONS
    cluster.start(f"max_connections={max(needed, 100)}")


async def _serve(config: Config, url: str, cluster: Cluster | None, log_format: LogFormat) -> int:
    """Serve, in this process or in several, until told to stop; return the exit status."""
    stop = stop_event()
    if not await _schema_is_there(url, stop):
        return 0
    keeper_died = asyncio.Event()

    def died() -> None:
        keeper_died.set()
        stop.set()

    tasks = BackgroundTasks(died)
    if cluster is not None:
        tasks.spawn(_keep_running(cluster, config), "postgres")
    try:
        if config.workers == 1:
            status = await run_server(config, url, stop, on_serving=log_serving)
        else:
            status = await Workers(config, url, log_format).run(stop)
        return status or int(keeper_died.is_set())
    finally:
        await tasks.cancel()


async def _schema_is_there(url: str, stop: asyncio.Event) -> bool:
    """Wait for the database and look at its schema; False when told to stop before it was there."""
    told = None
    while not stop.is_set():
        try:
            state = await asyncio.to_thread(schema.schema_state, url)
        except StorageUnavailable as error:
            cause = cause_of(error)
            if cause != told:
                _log.warning("waiting for the database", cause=cause)
                told = cause
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATABASE_LOOK):
                    await stop.wait()
            continue
        if state in (SchemaState.MISSING, SchemaState.OLDER):
            what = (
                "has no schema yet" if state is SchemaState.MISSING else "has an older schema than this version needs"
            )
            raise CommandError(f"the database {what}; run: collab migrate (with the same --database-url)")
        return True
    return False


async def _keep_running(cluster: Cluster, config: Config) -> None:
    """Start PostgreSQL again when it has died, for ever."""
    while True:
        await asyncio.sleep(_POSTGRES_LOOK)
        if await asyncio.to_thread(cluster.is_running):
            continue
        _log.error("postgres has died, starting it again")
        try:
            await asyncio.to_thread(_start, cluster, config)
            _log.info("postgres started")
        except EmbeddedError as error:
            _log.error("postgres does not start", cause=str(error))
