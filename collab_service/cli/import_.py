"""`collab import`: an exported session, written into a service again."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer

from collab_service.cli.archive import Archive, open_archive
from collab_service.cli.batches import batches
from collab_service.cli.connection import Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, status_of
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, events_in_words, print_json, progress, say
from collab_service.client import (
    DEFAULT_TARGET,
    CollabClient,
    Event,
    NewEvent,
    ServerSeqConflict,
    ServiceError,
    Session,
    Unavailable,
)
from collab_service.client.json_form import session_form

_BATCH_EVENTS = 500
_PAUSE = 0.5
_PATIENCE = 60.0
"""Seconds after which a service that stays away is given up."""


def import_session(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `collab export` wrote.")],
    room: Annotated[
        str | None, typer.Option(metavar="NAME", help="The new session's room, instead of the exported one's.")
    ] = None,
    no_room: Annotated[bool, typer.Option("--no-room", help="The new session gets no room.")] = False,
    into: Annotated[
        str | None,
        typer.Option(metavar="SESSION", help="Go on with an import that was cut short, in the session it had begun."),
    ] = None,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write an exported session into a new session.

    What the authors gave comes back to the letter: payloads, types, keys, hashes, signatures, and the order. What the
    service gives is new: the session's number, the events' ids and times, and so the chain.

    The file is checked before anything is written. An import that was cut short goes on when it is called again: by
    itself where the session has a room, else with `--into`.

    Example: `collab import minutes.jsonl --room minutes-again`
    """
    if sum((room is not None, no_room, into is not None)) > 1:
        raise CommandError("give one of --room, --no-room and --into at most", ExitStatus.USAGE)
    if file.exists() and not file.is_file() and not file.is_dir():
        raise CommandError(f"{file} is read twice, first to check it, so it must be a file and no pipe")
    with open_archive(file) as archive, progress(output) as bar:
        task = bar.add_task("check", total=archive.session.last_server_seq)
        for event in archive.whole():
            if event.server_seq % _BATCH_EVENTS == 0:
                bar.update(task, completed=event.server_seq)
        count = archive.check.last_server_seq
        exported = archive.session

    async def work() -> None:
        async with connected(target) as client:
            if into is not None:
                session, created = await find_session(client, into), False
            else:
                session, created = await client.create_session(
                    room=None if no_room else exported.room if room is None else room,
                    owner_id=exported.owner_id,
                    language_id=exported.language_id,
                )
            with open_archive(file) as archive:
                written = await _Import(client, session, count, output).write(archive)
            session = await client.get_session(session.id)
        if output is Output.JSON:
            print_json(session_form(session))
        elif written or created:
            say(f"Imported {events_in_words(count)} into session {session.id}")
        else:
            say(f"Session {session.id} has everything already: {events_in_words(count)}")

    run(work())


class _Import:
    """Writes events into a session in which nobody else writes, each at the number that it has in the file.

    Nothing is added to the events that could make a retry safe, such as keys. What makes it safe is their numbers: a
    batch is appended only behind all before it, and after a cut the session is looked at to see what it has.
    """

    def __init__(self, client: CollabClient, session: Session, count: int, output: Output) -> None:
        self._client = client
        self._session = session
        self._count = count
        self._output = output
        self._head = session.last_server_seq
        """The number up to which the session has the file's events."""

    async def write(self, archive: Archive) -> int:
        """Compare what is there, write what is not, and return how many events those were."""
        events = (event.content() for event in archive.whole())
        with progress(self._output) as bar:
            task = bar.add_task("compare", total=self._count)
            await self._compare(events)
            written = self._count - self._head
            bar.update(task, description="import", completed=self._head)
            try:
                for batch in batches(events, _BATCH_EVENTS):
                    await self._append(batch)
                    bar.update(task, completed=self._head)
            except (asyncio.CancelledError, ServiceError) as error:
                raise self._cut_short(error) from error
        return written

    async def _compare(self, events: Iterator[NewEvent]) -> None:
        """Check that the session begins as the file does; takes as many of the events as there are in both."""
        if self._head > self._count:
            raise self._other(self._count + 1)
        if self._head:
            async with aclosing(self._client.read(self._session.id, limit=self._head)) as stored:
                async for event in stored:
                    self._check(event, next(events))

    async def _append(self, batch: Sequence[NewEvent]) -> None:
        give_up_at = time.monotonic() + _PATIENCE
        while True:
            try:
                stored = await self._client.append_batch(
                    self._session.id, batch, expected_last_server_seq=self._head, auto_key=False
                )
            except Unavailable as error:  # it was sent once only, for it may have been written
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(error.retry_after or _PAUSE)
            except ServerSeqConflict:
                # An attempt that was cut has written it, or else somebody has written something.
                await self._find(batch)
                return
            else:
                self._head = stored.last_server_seq
                return

    async def _find(self, batch: Sequence[NewEvent]) -> None:
        """Check that the session goes on with a batch, and ends there."""
        session = await self._client.get_session(self._session.id)
        if session.last_server_seq != self._head + len(batch):
            raise self._other(min(session.last_server_seq, self._head + len(batch)) + 1)
        wanted = iter(batch)
        async with aclosing(self._client.read(self._session.id, since=self._head, limit=len(batch))) as stored:
            async for event in stored:
                self._check(event, next(wanted))
        self._head = session.last_server_seq

    def _check(self, stored: Event, wanted: NewEvent) -> None:
        if stored.content() != wanted:
            raise self._other(stored.server_seq)

    def _other(self, number: int) -> CommandError:
        room = "" if self._session.room is None else f", which has the room {self._session.room},"
        how = "another than the file's" if number <= self._count else "not in the file"
        return CommandError(
            f"session {self._session.id}{room} is not this import: event {number:,} is {how}; "
            "import into a new session with --no-room or --room NAME",
            ExitStatus.CONFLICT,
        )

    def _cut_short(self, error: BaseException) -> CommandError:
        session = self._session
        again = "call it again" if session.room is not None else f"call it again with --into {session.id}"
        what = f"{str(error) or 'interrupted'}; session {session.id} has {self._head:,} of {self._count:,} events"
        status = ExitStatus.INTERRUPTED
        if isinstance(error, ServiceError):
            status = status_of(error)
        return CommandError(f"{what}; to go on, {again}", status)
