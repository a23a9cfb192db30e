"""`collab export`: a session into a file."""

import asyncio
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from collab_service.cli.archive import HEADER_BYTES, end_line, event_line, header_line, is_begun_header, open_archive
from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, status_of
from collab_service.cli.loop import run
from collab_service.cli.output import events_in_words, progress
from collab_service.client import DEFAULT_TARGET, BrokenLog, CollabClient, LogCheck, ServiceError, Session
from collab_service.client.json_form import iso_time

_GO_ON = "and the same command again goes on from there"


def export(
    session: SessionName,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Where to write; standard output when it is not given.", show_default=False
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
        count = events_in_words(check.last_server_seq)
        print(f"Exported session {found.id}: {count}, chain {check.chain_hash.hex()}", file=sys.stderr)

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
    partial = file.with_name(file.name + ".partial")
    check = LogCheck(session.id)
    try:
        _refuse_to_replace(file)
        with partial.open("ab") as out:
            _lock(out, partial)
            _refuse_to_replace(file)  # another export may just have ended
            check, size = _begun(partial, session)
            out.truncate(size)
            if not size:
                out.write(header_line(session))
            yield check, out
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)
    except (asyncio.CancelledError, ServiceError) as error:
        status = status_of(error) if isinstance(error, ServiceError) else ExitStatus.INTERRUPTED
        held = f"{partial} holds {events_in_words(check.last_server_seq)}"
        raise CommandError(f"{str(error) or 'interrupted'}; {held}, {_GO_ON}", status) from error
    except OSError as error:
        # How much of what was written has come to the disk is not known here.
        held = f"what {partial} holds is kept, {_GO_ON}" if check.last_server_seq else "nothing was exported"
        raise CommandError(f"cannot write {partial}: {error.strerror}; {held}") from error


def _refuse_to_replace(file: Path) -> None:
    if file.exists():
        raise CommandError(f"{file} is there already; remove it, or choose another name")


def _lock(out: BinaryIO, partial: Path) -> None:
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CommandError(f"another export is writing {partial}; wait for it, or choose another name") from error


def _begun(partial: Path, session: Session) -> tuple[LogCheck, int]:
    """Return how far an earlier export has come, and the size of what it has written as it should."""
    with partial.open("rb") as file:
        if is_begun_header(file.readline(HEADER_BYTES)):
            return LogCheck(session.id), 0
    with open_archive(partial) as archive:
        if (archive.session.id, archive.session.created_at) != (session.id, iso_time(session.created_at)):
            raise CommandError(
                f"{partial} is of another session, {archive.session.id}; remove it, or choose another name"
            )
        try:
            for _ in archive.events():
                pass
        except CommandError as error:
            raise CommandError(f"{error}; remove it and export again", error.status) from error
        # Its last line, if there is one, is written anew: the session may have grown.
        return archive.check, archive.size


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
    if (check.last_server_seq, check.chain_hash) != (session.last_server_seq, session.chain_hash):
        raise BrokenLog(
            f"the events of session {session.id} do not end in the chain that the service says they have; if they were "
            "exported before it was restored, remove FILE.partial and export again"
        )
    out.write(end_line(check))
