"""What `collab serve` does: it provides a database, and serves until it is told to stop."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import structlog

from collab_service.addresses import AddressError, free_place
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.loop import new_event_loop
from collab_service.cli.migrate import check_database_url
from collab_service.cli.process import check_reach, log_serving, run_server, server_errors, stop_event, stop_signals
from collab_service.cli.workers import Workers
from collab_service.config import Config
from collab_service.log.background import BackgroundTasks
from collab_service.logs import LogFormat, configure_logs
from collab_service.metrics import Metrics
from collab_service.model.errors import StorageUnavailable
from collab_service.storage import schema
from collab_service.storage.database import place_of, reach
from collab_service.storage.driver_errors import cause_of, is_refusal, is_wrong_url
from collab_service.storage.embedded import Cluster, DataDirectory, EmbeddedError
from collab_service.storage.embedded.accounts import postgres_account
from collab_service.storage.schema import SchemaState, UnsuitableDatabase

_log = structlog.get_logger(__name__)

_DATABASE_LOOK = 1.0
"""Seconds between looks for a database that is not there when the server starts."""
_DATABASE_WORD = 10.0
"""Seconds after which it is said again that the database is not there; when the cause changes, it is said at once."""
_POSTGRES_LOOK = 1.0
"""Seconds between looks for the PostgreSQL of our own, which is started again when it has died."""

_OTHER_CONNECTIONS = 11
"""Of a process besides its pool: six to append, two for tails, two for notifications, one for its health."""
_SPARE_CONNECTIONS = 20
"""For people who look into the database."""


def run(config: Config, log_format: LogFormat, *, allow_unauthenticated: bool, http_if_free: bool) -> int:
    """Serve until SIGTERM or Ctrl-C, and return the exit status.

    Args:
        config: The settings.
        log_format: How to log.
        allow_unauthenticated: Listen on addresses that other machines reach, too.
        http_if_free: Go without the gateway where somebody else has its address.

    Raises:
        CommandError: It is not possible.
    """
    with server_errors(EmbeddedError, UnsuitableDatabase):
        check_reach("--grpc-address", config.grpc_address, allow_unauthenticated)
        if config.http_address is not None:
            check_reach("--http-address", config.http_address, allow_unauthenticated)
        if config.database_url is not None:
            check_database_url(config.database_url)
        configure_logs(log_format)
        return _run(config, log_format, http_if_free=http_if_free)


class _Stopped(BaseException):
    """A signal to stop came while nothing was running yet."""


def _run(config: Config, log_format: LogFormat, *, http_if_free: bool) -> int:
    def stop_starting(*_: object) -> None:
        raise _Stopped

    for number in stop_signals():
        signal.signal(number, stop_starting)
    try:
        # A parent of workers has little to do but to watch processes, at which asyncio's own loop is the more robust.
        loop_factory = new_event_loop if config.workers == 1 else None
        with _database(config) as (url, cluster), asyncio.Runner(loop_factory=loop_factory) as runner:
            if http_if_free:
                config = _without_a_gateway_where_its_port_is_taken(config)
            return runner.run(_serve(config, url, cluster, log_format))
    except _Stopped:
        return 0


def _without_a_gateway_where_its_port_is_taken(config: Config) -> Config:
    if config.http_address is not None:
        try:
            free_place(config.http_address, option="--http-address")
        except AddressError as error:
            _log.warning("the gateway is not started", cause=str(error))
            return replace(config, http_address=None)
    return config


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
            _migrate(cluster, data)
            yield cluster.url, cluster
        finally:
            for number in stop_signals():
                signal.signal(number, signal.SIG_IGN)  # the end is near; it must be a clean one
            cluster.stop()
            _log.info("postgres stopped")
    finally:
        data.release()


def _migrate(cluster: Cluster, data: DataDirectory) -> None:
    try:
        schema.migrate(cluster.url)
    except StorageUnavailable as error:
        cause = cause_of(error)
        hint = f"; is {data.path}/password the one that it was made with?" if is_refusal(cause) else ""
        raise CommandError(f"the PostgreSQL in {data.path} cannot be used: {cause}{hint}") from error


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
            status = await run_server(config, url, Metrics(), stop, on_serving=partial(log_serving, url))
        else:
            status = await Workers(config, url, log_format).run(stop)
        return status or int(keeper_died.is_set())
    finally:
        await tasks.cancel()


async def _schema_is_there(url: str, stop: asyncio.Event) -> bool:
    """Wait for the database and look at its schema; False when told to stop before it was there.

    A database that does not exist yet is waited for, since whoever starts everything at once also makes it. A login
    that is refused is an error: time does not make a password right.
    """
    told: tuple[str, float] | None = None
    stopped = asyncio.create_task(stop.wait(), name="stop-while-waiting")
    while not stop.is_set():
        # Connecting can take long, and this way of doing it can be cancelled.
        reaching = asyncio.create_task(reach(url), name="database")
        await asyncio.wait((reaching, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not reaching.done():
            reaching.cancel()
            break
        try:
            await reaching
            state = await asyncio.to_thread(schema.schema_state, url)
        except StorageUnavailable as error:
            cause = cause_of(error)
            if is_refusal(cause):
                raise CommandError(
                    f"the database does not let us in: {cause}; correct the user and the password in --database-url "
                    "or COLLAB_DATABASE_URL, or what the server allows (pg_hba.conf)"
                ) from error
            if is_wrong_url(cause):
                raise CommandError(f"the database URL cannot be used: {cause}", ExitStatus.USAGE) from error
            now = time.monotonic()
            if told is None or told[0] != cause or now > told[1] + _DATABASE_WORD:
                _log.warning("waiting for the database", database=place_of(url), cause=cause)
                told = cause, now
            await asyncio.wait((stopped,), timeout=_DATABASE_LOOK)
            continue
        stopped.cancel()
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
