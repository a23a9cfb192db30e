"""`collab export`: a session into a file."""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from collab_service.cli.archive import end_line, event_line, header_line, open_archive
from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, status_of
from collab_service.cli.loop import run
from collab_service.cli.output import progress
from collab_service.client import DEFAULT_TARGET, CollabClient, LogCheck, ServiceError, Session


def export(
    session: SessionName,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Where to write; standard output when it is not given.", show_default=False
        ),
    ] = None,
    target: Target = DEFAULT_TARGET,
) -> None:
    """Write a session, as far as it has come, into a file of JSON lines: lossless, and checked on the way.

    The file gets its name when it is whole; until then it is FILE.partial. When that is there already, of an export
    that was cut short, the export goes on where it stopped. `collab verify` checks the file, `collab import` writes it
    into a service again.

    Examples:

    * `collab export 7 minutes.jsonl`

    * `collab export minutes | gzip > minutes.jsonl.gz`
    """

    async def work() -> None:
        async with connected(target) as client:
            found = await find_session(client, session)
            with _standard_output(found) if file is None else _file(file, found) as (check, out):
                await _write_events(client, found, check, out)
        told = f"Exported session {found.id}: {check.last_server_seq:,} events, chain {check.chain_hash.hex()}"
        print(told, file=sys.stderr)

    run(work())


@contextmanager
def _standard_output(session: Session) -> Iterator[tuple[LogCheck, BinaryIO]]:
    out = sys.stdout.buffer
    out.write(header_line(session))
    yield LogCheck(session.id), out
    out.flush()


@contextmanager
def _file(file: Path, session: Session) -> Iterator[tuple[LogCheck, BinaryIO]]:
    """Provide FILE.partial to write into, and how far it has come; give it its name at the end."""
    if file.exists():
        raise CommandError(f"{file} is there already; remove it, or choose another name")
    partial = file.with_name(file.name + ".partial")
    try:
        check, size = _begun(partial, session)
        with partial.open("r+b" if size else "wb") as out:
            out.seek(size)
            out.truncate()
            if not size:
                out.write(header_line(session))
            try:
                yield check, out
            except (asyncio.CancelledError, ServiceError) as error:
                status = ExitStatus.INTERRUPTED
                if isinstance(error, ServiceError):
                    status = status_of(error)
                raise CommandError(
                    f"{str(error) or 'interrupted'}; {partial} holds {check.last_server_seq:,} events, and the same "
                    "command again goes on from there",
                    status,
                ) from error
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)
    except OSError as error:
        raise CommandError(
            f"cannot write {partial}: {error.strerror}; what was written is kept, and the same command again goes on "
            "from there"
        ) from error


def _begun(partial: Path, session: Session) -> tuple[LogCheck, int]:
    """Return how far an earlier export has come, and the size of what it has written as it should."""
    if not partial.exists() or not partial.stat().st_size:
        return LogCheck(session.id), 0
    with open_archive(partial) as archive:
        if archive.session.id != session.id:
            raise CommandError(f"{partial} is of session {archive.session.id}; remove it, or choose another name")
        try:
            for _ in archive.events():
                pass
        except CommandError as error:
            raise CommandError(f"{error}; remove it and export again", error.status) from error
        # Its last line, if there is one, is written anew: the session may have grown.
        size = archive.size - (len(end_line(archive.check)) if archive.is_whole else 0)
        return archive.check, size


async def _write_events(client: CollabClient, session: Session, check: LogCheck, out: BinaryIO) -> None:
    """Write the events that `check` has not seen, and the last line."""
    limit = session.last_server_seq - check.last_server_seq
    if limit < 0:
        raise CommandError(f"session {session.id} is shorter than what was exported of it; was it restored?")
    with progress() as bar:
        task = bar.add_task("export", total=session.last_server_seq, completed=check.last_server_seq)
        if limit:  # a limit of 0 would read what comes meanwhile
            async with aclosing(client.read_pages(session.id, since=check.last_server_seq, limit=limit)) as pages:
                async for page in pages:
                    for event in page.events:
                        check.add(event)
                        out.write(event_line(event))
                    bar.update(task, completed=check.last_server_seq)
    out.write(end_line(check))
