"""`collab doctor`: is the service there, is it well, and if not, what is wrong and what to do."""

import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from collab_service.cli.connection import Target, connected
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, print_json, printable
from collab_service.cli.settings import DatabaseUrl
from collab_service.client import DEFAULT_TARGET, BrokenLog, CollabClient, LogCheck, NewEvent, ServiceError

_SKEW = 2.0
"""Seconds that two clocks may differ."""
_SLOW = 0.1
"""Seconds from which on an append by a lone caller is slow."""


class _Unwell(Exception):
    """A check has failed; the message says what is wrong and what to do."""


def doctor(
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Write nothing: no session is created, appended to and deleted.")
    ] = False,
    database_url: DatabaseUrl = None,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check that the service is reachable, healthy and writes, that clocks agree, and say what to do if not.

    It creates a session, appends, reads it back and deletes it, unless `--read-only`. With a database URL it looks at
    the database and its schema as well. The exit status is 0 when all is well, 3 when the service cannot be used just
    now, 6 when something else is wrong.

    Example: `collab doctor --target collab.internal:50051`
    """
    status = ExitStatus.DONE

    def tell(check: str, ok: bool, message: str) -> None:
        if output is Output.JSON:
            print_json({"check": check, "ok": ok, "message": message})
        else:
            mark = Text("ok  ", "green") if ok else Text("BAD ", "bold red")
            Console(highlight=False, soft_wrap=True).print(Text.assemble(mark, f" {check:<9} ", printable(message)))

    @contextmanager
    def checking(check: str) -> Iterator[None]:
        nonlocal status
        try:
            yield
        except (_Unwell, ServiceError, BrokenLog) as error:
            status = ExitStatus.CHECK_FAILED
            tell(check, False, str(error))

    async def work() -> None:
        nonlocal status
        try:
            started = time.perf_counter()
            async with connected(target) as client:
                tell("reachable", True, f"{target} answers in {_ms(time.perf_counter() - started)}, and is healthy")
                with checking("reading"):
                    tell("reading", True, await _reading(client))
                if read_only:
                    return
                with checking("writing"):
                    skew, message = await _writing(client)
                    tell("writing", True, message)
                    with checking("clock"):
                        tell("clock", True, _clock(skew))
        except CommandError as error:
            if error.status is ExitStatus.USAGE:
                raise
            status = ExitStatus.UNAVAILABLE if error.status is ExitStatus.UNAVAILABLE else ExitStatus.CHECK_FAILED
            tell("reachable", False, str(error))

    if database_url:
        problem = _database_problem(database_url)
        if problem is None:
            tell("database", True, "it answers, and has the schema that this version needs")
        else:
            status = ExitStatus.CHECK_FAILED
            tell("database", False, problem)
    run(work())
    raise typer.Exit(status)


async def _reading(client: CollabClient) -> str:
    started = time.perf_counter()
    page = await client.list_sessions_page(page_size=1)
    what = "there are sessions" if page.sessions else "there is no session yet"
    return f"sessions are listed in {_ms(time.perf_counter() - started)}; {what}"


async def _writing(client: CollabClient) -> tuple[float, str]:
    """Write, read back, delete; return by how many seconds two clocks differ at least, and what was seen."""
    before = datetime.now(UTC)
    session, _ = await client.create_session(owner_id="collab doctor")
    after = datetime.now(UTC)
    try:
        durations = []
        for n in range(5):
            started = time.perf_counter()
            await client.append(session.id, NewEvent.of({"check": n}, type="doctor"))
            durations.append(time.perf_counter() - started)
        check = LogCheck(session.id)
        async with aclosing(client.read(session.id)) as events:
            async for event in events:
                check.add(event)
        if check.last_server_seq != len(durations):
            raise _Unwell(f"{len(durations)} events were acknowledged and {check.last_server_seq} read back")
    finally:
        with suppress(ServiceError):
            await client.delete_session(session.id)
    usual = sorted(durations)[len(durations) // 2]
    if usual > _SLOW:
        raise _Unwell(
            f"an append takes {_ms(usual)}; look at the disk and the load of the database's machine, and at the "
            "network between"
        )
    # The service's clock was read at some moment between the two.
    skew = max((before - session.created_at).total_seconds(), (session.created_at - after).total_seconds(), 0.0)
    return skew, f"an append is durable in {_ms(usual)}; {len(durations)} were read back, and their chain holds"


def _clock(skew: float) -> str:
    if skew > _SKEW:
        raise _Unwell(
            f"the service's clock and this machine's differ by {skew:,.1f} s; events carry the service's, so set the "
            "one that is wrong (NTP)"
        )
    return "the service's clock and this machine's agree"


def _database_problem(url: str) -> str | None:
    """Return what is wrong with a database, and what to do; None when it is as the service needs it."""
    from collab_service.cli.migrate import check_database_url
    from collab_service.model.errors import StorageUnavailable
    from collab_service.storage import schema
    from collab_service.storage.driver_errors import cause_of

    try:
        check_database_url(url)
        state = schema.schema_state(url)
    except StorageUnavailable as error:
        return f"it cannot be used: {cause_of(error)}"
    except (CommandError, schema.UnsuitableDatabase) as error:
        return str(error)
    if state in (schema.SchemaState.MISSING, schema.SchemaState.OLDER):
        what = "has no schema yet" if state is schema.SchemaState.MISSING else "has an older schema than is needed"
        return f"it {what}; run: collab migrate (with the same --database-url)"
    return None


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"
