"""`collab verify`: the chain of a session, or of a file, computed anew."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer

from collab_service.cli.archive import open_archive
from collab_service.cli.connection import Target, connected, find_session, is_number
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, print_json, progress, rate, say
from collab_service.client import DEFAULT_TARGET, BrokenLog, CollabClient, Event, LogCheck, Session


def verify(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SESSION|FILE",
            help="A session, by its number or room (`room:NAME` where a file has that name), or an exported file.",
        ),
    ],
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check that a log is what was stored: every number there once, times in order, the chain computed anew.

    A session is read from the service; an exported file is checked without one. The chain's last hash is printed:
    whoever else holds the log, and computes the same, holds the same events.

    Examples:

    * `collab verify 7`

    * `collab verify minutes.jsonl`
    """
    path = Path(what)
    started = time.perf_counter()
    if not what.startswith("room:") and not is_number(what) and (_is_file(path) or path.suffix == ".jsonl"):
        check = _verify_file(path, output)
        name = str(path)
    else:
        check = LogCheck(0)

        async def work() -> None:
            nonlocal check
            async with connected(target) as client:
                check = await verify_session(client, await _find(client, what), output)

        run(work())
        name = f"session {check.session_id}"
    count = check.last_server_seq
    if output is Output.JSON:
        print_json({"sessionId": check.session_id, "events": count, "chainHash": check.chain_hash.hex()})
    else:
        say(f"{name} is whole: {rate(count, time.perf_counter() - started)}, every number once, times in order")
        say(f"chain {check.chain_hash.hex()}, computed anew")


def _is_file(path: Path) -> bool:
    """Tell whether there is a file, or something else to read from such as a pipe."""
    return path.exists() and not path.is_dir()


async def _find(client: CollabClient, what: str) -> Session:
    try:
        return await find_session(client, what)
    except CommandError as error:
        if error.status is not ExitStatus.NOT_FOUND:
            raise
        raise CommandError(
            f"there is neither a file '{what}' nor a session with this room; see those there are with: "
            "collab session list",
            error.status,
        ) from error


async def verify_session(client: CollabClient, session: Session, output: Output) -> LogCheck:
    """Read a session up to its head as it is known, and check it, both as the columns have it and as lists show it.

    Raises:
        BrokenLog: It is not right.
    """
    check = LogCheck(session.id)
    head = session.last_server_seq
    with progress(output) as bar:
        task = bar.add_task("verify", total=head)
        if head:  # a limit of 0 would read what comes meanwhile
            async with aclosing(client.read_pages(session.id, limit=head, of_columns=True)) as pages:
                async for page in pages:
                    for event in page.events:
                        check.add(event)
                    if page.events:
                        await _compare(client, page.events)
                    bar.update(task, completed=check.last_server_seq)
    if (check.last_server_seq, check.chain_hash) != (head, session.chain_hash):
        raise BrokenLog(
            f"the log of session {session.id} is not right: the service says that it ends with event {head} and the "
            f"chain {session.chain_hash.hex()}, but its events end with {check.last_server_seq} and "
            f"{check.chain_hash.hex()}"
        )
    return check


async def _compare(client: CollabClient, events: Sequence[Event]) -> None:
    """Read events, made of the columns, in a list as well, and compare."""
    first, session_id = events[0].server_seq, events[0].session_id
    async with aclosing(client.read(session_id, since=first - 1, limit=len(events))) as listed:
        for number, event in enumerate(events):
            if await anext(listed, None) != event:
                raise BrokenLog(
                    f"the log of session {session_id} is not right: the columns of the table, and the envelope beside "
                    f"them of which lists are made, say different things of event {first + number}"
                )


def _verify_file(path: Path, output: Output) -> LogCheck:
    with open_archive(path) as archive, progress(output) as bar:
        task = bar.add_task("verify", total=archive.session.last_server_seq)
        for event in archive.whole():
            if event.server_seq % 500 == 0:
                bar.update(task, completed=event.server_seq)
        return archive.check
