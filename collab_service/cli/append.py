"""`collab append`: one event, or everything that comes through a pipe."""

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, status_of
from collab_service.cli.line_reader import LineReader
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, print_json, progress, rate, say
from collab_service.client import DEFAULT_TARGET, AppendedBatch, CollabClient, InvalidRequest, NewEvent, ServiceError
from collab_service.client.json_form import line_form
from collab_service.model.payload import json_object_problem

_LAST_WAIT = 5.0
"""Seconds after Ctrl-C in which an append that is on its way may still be answered."""
_SPACE = " \t\r"
"""What JSON allows around an object in its line."""


def append(
    session: SessionName,
    source: Annotated[
        str | None, typer.Argument(metavar="-", help="Append each line of standard input, a JSON object.")
    ] = None,
    json: Annotated[str | None, typer.Option("--json", metavar="TEXT", help="The payload: one JSON object.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file whose content is the payload.")
    ] = None,
    binary: Annotated[bool, typer.Option("--binary", help="The file is bytes and no JSON object.")] = False,
    actor: Annotated[str | None, typer.Option(metavar="USER", help="Who did it.")] = None,
    type_: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="What kind of event it is.")] = None,
    client_seq: Annotated[int | None, typer.Option(min=0, metavar="N", help="The author's own counter.")] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The idempotency key: the same event again is not stored again."),
    ] = None,
    expect: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Only if N is the session's last number; 0: none yet."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Lines of a pipe in one append, at most.")
    ] = 1000,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Append one event to a session, or one for each line of a pipe.

    Lines are appended as they come, in batches while there are many; blank ones are skipped. When a line is no event,
    or the service fails, what came before it is stored, nothing after it is, and a sentence says which line it was.

    Examples:

    * `collab append 7 --json '{"text": "hello"}' --actor ada --type edit`

    * `collab append 7 --file update.bin --binary`

    * `jq -c '.[]' events.json | collab append minutes -`
    """
    if source not in (None, "-"):
        raise CommandError(
            f"what is {source}? Give the event with --json TEXT or --file FILE, or - for lines of standard input",
            ExitStatus.USAGE,
        )
    if sum(given is not None for given in (source, json, file)) != 1:
        raise CommandError("append what? Give one of --json TEXT, --file FILE, or - for a pipe", ExitStatus.USAGE)
    if binary and file is None:
        raise CommandError("--binary goes with --file", ExitStatus.USAGE)
    if source is not None and (key is not None or client_seq is not None or expect is not None):
        raise CommandError("--key, --client-seq and --expect are for one event, not for a pipe", ExitStatus.USAGE)
    if source is not None and sys.stdin is None:
        raise CommandError("standard input is closed, and there is nothing to read from")

    async def work() -> None:
        async with connected(target) as client:
            session_id = (await find_session(client, session)).id
            if source is not None:
                await _Pipe(client, session_id, actor, type_, output).append(batch)
                return
            payload = _read(file, binary) if file is not None else json or ""
            event = NewEvent(payload, actor_id=actor, type=type_, client_seq=client_seq, idempotency_key=key)
            stored, replayed = await client.append(session_id, event, expected_last_server_seq=expect)
        if output is Output.JSON:
            print_json(line_form(stored))
        elif replayed:
            say(f"Event {stored.server_seq} of session {session_id} has this key and content already")
        else:
            say(f"Appended event {stored.server_seq} to session {session_id}")

    run(work())


def _read(file: Path, binary: bool) -> str | bytes:
    try:
        return file.read_bytes() if binary else file.read_bytes().decode()
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is no JSON object: it is not UTF-8; --binary appends it as bytes") from error


class _Pipe:
    """Appends the lines of standard input, and remembers how far it has come."""

    def __init__(
        self, client: CollabClient, session_id: int, actor: str | None, type_: str | None, output: Output
    ) -> None:
        self._client = client
        self._session_id = session_id
        self._actor = actor
        self._type = type_
        self._output = output
        self._lines = 0
        """Lines that are done with."""
        self._events = 0
        self._first = 0
        self._last = 0
        self._is_in_doubt = False
        """Whether an append was left on its way."""

    async def append(self, batch: int) -> None:
        """Append everything that comes, in batches of so many lines at most."""
        started = time.perf_counter()
        typed = sys.stdin.isatty()  # then a bar would get between the lines
        if typed and self._output is Output.TEXT:
            print("One JSON object a line; Ctrl-D ends.", file=sys.stderr)
        try:
            with progress(self._output, hidden=typed) as bar:
                task = bar.add_task("append", total=None)
                async for lines in LineReader(batch).batches():
                    await self._append(lines)
                    bar.update(task, completed=self._events)
        except (asyncio.CancelledError, ServiceError, CommandError) as error:
            raise self._cut_short(error) from error
        if self._output is Output.JSON:
            print_json(
                {
                    "sessionId": self._session_id,
                    "events": self._events,
                    "firstServerSeq": self._first or None,
                    "lastServerSeq": self._last or None,
                }
            )
        else:
            told = rate(self._events, time.perf_counter() - started)
            say(f"Appended {told} to session {self._session_id}; its last number is {self._last}" if self._events
                else "There was nothing to append")  # fmt: skip

    async def _append(self, lines: Sequence[bytes]) -> None:
        """Append a batch: up to the first line that is no JSON object, and then say which that is."""
        events: list[tuple[int, NewEvent]] = []
        problem, number = None, self._lines
        for line in lines:
            text, problem = _json_object(line)
            if problem is not None:
                break
            number += 1
            if text:
                events.append((number, NewEvent(text, actor_id=self._actor, type=self._type)))
        await self._store(events, number)
        if problem is not None:
            raise CommandError(f"line {number + 1:,} {problem}")

    async def _store(self, events: Sequence[tuple[int, NewEvent]], through: int) -> None:
        """Append events, each with the number of its line; then all lines up to `through` are done with."""
        if not events:
            self._lines = through
            return
        appending = self._client.append_batch(self._session_id, [event for _, event in events])
        storing = asyncio.create_task(appending, name="append")
        try:
            await asyncio.shield(storing)
        except InvalidRequest as error:  # nothing of the batch is stored, but what comes before the bad one can be
            place, problem = _refusal(error, len(events))
            if place is None:
                raise
            number, _ = events[place]
            await self._store(events[:place], number - 1)
            raise CommandError(f"line {number:,}{problem}", status_of(error)) from error
        finally:  # on Ctrl-C, too, whenever it comes, so that it can be said what is stored
            try:
                if not storing.done():
                    await asyncio.wait((storing,), timeout=_LAST_WAIT)
            finally:
                self._take_note(storing, len(events), through)

    def _take_note(self, storing: "asyncio.Task[AppendedBatch]", count: int, through: int) -> None:
        if not storing.done():
            self._is_in_doubt = True
            storing.cancel()
        elif (failure := storing.exception()) is not None:
            self._is_in_doubt = isinstance(failure, ServiceError) and failure.side_effects == "unknown"
        else:
            stored = storing.result()
            self._events += count
            self._first = self._first or stored.first_server_seq
            self._last = stored.last_server_seq
            self._lines = through

    def _cut_short(self, error: BaseException) -> CommandError:
        """Return the error that says what went wrong, how much is stored, and how to go on."""
        stored = f"the {self._events:,} events before are stored" if self._events > 1 else "the event before is stored"
        if not self._events:
            stored = "nothing was stored"
        go_on = "try again"
        if self._lines:
            n = self._lines + 1
            go_on = f"go on with line {n:,}: tail -n +{n} FILE | collab append {self._session_id} -"
        match error:
            case CommandError():
                return CommandError(f"{error}; {stored}; correct it and {go_on}", error.status)
            case ServiceError():
                what, status = str(error), status_of(error)
                in_doubt = error.side_effects == "unknown"
            case _:
                what, status, in_doubt = "interrupted", ExitStatus.INTERRUPTED, self._is_in_doubt
        if in_doubt:
            look = f"look with: collab list {self._session_id} --since {self._last}"
            return CommandError(f"{what}; {stored}, and some of the next may be: {look}", status)
        return CommandError(f"{what}; {stored}; {go_on}", status)


def _json_object(line: bytes) -> tuple[str, str | None]:
    """Return the text of a line, and what keeps it from being a JSON object; a blank line has no text."""
    try:
        text = line.decode().strip(_SPACE)
    except UnicodeDecodeError:
        return "", "is not UTF-8"
    return text, json_object_problem(text) if text else None


def _refusal(error: InvalidRequest, count: int) -> tuple[int | None, str]:
    """Return the first event of a batch that the service refuses, and why; None when it is the batch as a whole."""
    problems: dict[int, list[str]] = {}
    for violation in error.violations:
        if found := re.fullmatch(r"events\[(\d+)\]\.(\w+)", violation.field):
            what = f" {violation.message}" if found[2] == "json" else f": {found[2]} {violation.message}"
            problems.setdefault(int(found[1]), []).append(what)
    if problems:
        place = min(problems)
        return place, ";".join(problems[place])
    return 0 if count == 1 else None, f" is refused: {error}"
