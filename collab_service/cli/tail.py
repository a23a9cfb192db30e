"""`collab list` and `collab tail`: a session's events, as they are and as they come."""

import asyncio
import io
import select
import sys
import threading
from contextlib import aclosing, suppress
from typing import Annotated

import typer

from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, ended_by_its_reader
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, event_lines
from collab_service.client import DEFAULT_TARGET

Since = Annotated[int, typer.Option(min=0, metavar="N", help="Begin after this number; 0 is the beginning.")]
Types = Annotated[str | None, typer.Option(metavar="TYPE,…", help="Only events of these types, separated by commas.")]


def list_events(
    session: SessionName,
    since: Since = 0,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most so many; 0 lists all.")] = 0,
    types: Types = None,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """List a session's events, from the beginning to the head as it is now.

    Each is a line: its number, its time, who did it, its type (`-` where there is none) and its payload.

    Examples:

    * `collab list 7 --since 100 --limit 20`

    * `collab list minutes --types edit --output json | jq .payload`
    """

    async def work() -> None:
        lines = event_lines(output)
        async with connected(target) as client:
            found = await find_session(client, session)
            async with aclosing(client.read(found.id, since=since, limit=limit, types=_types(types))) as events:
                async for event in events:
                    lines.print(event)

    run(work())


def tail(
    session: SessionName,
    since: Since = 0,
    new: Annotated[
        bool, typer.Option("--new", help="Begin at the session's end, with what comes from now on.")
    ] = False,
    types: Types = None,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show a session's events as they come, until Ctrl-C.

    Each is a line: its number, its time, who did it, its type (`-` where there is none) and its payload. When the
    connection or the server is lost, it goes on after the last number shown as soon as there is one again.

    Examples:

    * `collab tail 7 --since 100`

    * `collab tail minutes --new --types edit,decision`
    """
    if new and since:
        raise CommandError("give either --since or --new", ExitStatus.USAGE)

    async def work() -> None:
        _cancel_when_nobody_reads()
        lines = event_lines(output)
        async with connected(target) as client:
            found = await find_session(client, session)
            start = found.last_server_seq if new else since
            async with aclosing(client.follow_pages(found.id, since=start, types=_types(types))) as pages:
                async for page in pages:
                    for event in page.events:
                        lines.print(event)
                    lines.flush()

    with ended_by_its_reader():
        run(work(), interrupted=ExitStatus.DONE)


def _types(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def _cancel_when_nobody_reads() -> None:
    """Cancel the current task once the other end of standard output is closed, as `head` does."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def wait() -> None:
        poll = select.poll()
        with suppress(io.UnsupportedOperation):  # standard output is no file
            poll.register(sys.stdout.fileno(), 0)  # errors are always told
            poll.poll()
            with suppress(RuntimeError):  # what was to be cancelled has noticed it, too, and the loop is closed
                loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=wait, daemon=True).start()
