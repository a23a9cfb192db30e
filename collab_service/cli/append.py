"""`collab append`: one event, or everything that comes through a pipe."""

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus, status_of
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, print_json, progress, rate, say
from collab_service.client import DEFAULT_TARGET, CollabClient, NewEvent, ServiceError
from collab_service.client.json_form import event_form
from collab_service.model.limits import MAX_INT64
from collab_service.model.payload import json_object_problem

_BATCH_BYTES = 2 * 1024 * 1024
_LINE_BYTES = 64 * 1024 * 1024
"""A longer line is no event: the service takes payloads of 1 MiB, unless configured."""
_AHEAD_BYTES = 8 * 1024 * 1024
"""How much is read while a batch is being appended."""


def append(
    session: SessionName,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="`-` appends each line of standard input, a JSON object.")
    ] = None,
    json: Annotated[str | None, typer.Option("--json", metavar="TEXT", help="The payload: one JSON object.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file whose content is the payload.")
    ] = None,
    binary: Annotated[bool, typer.Option("--binary", help="The file is bytes and no JSON object.")] = False,
    actor: Annotated[str | None, typer.Option(metavar="USER", help="Who did it.")] = None,
    type_: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="What kind of event it is.")] = None,
    client_seq: Annotated[
        int | None, typer.Option(min=0, max=MAX_INT64, metavar="N", help="The author's own counter.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The idempotency key: the same event again is not stored again."),
    ] = None,
    expect: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_INT64, metavar="N", help="Only if N is the session's last number; 0: none yet."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Lines of a pipe in one append, at most.")] = 1000,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Append one event to a session, or one for each line of a pipe.

    Lines are appended as they come, in batches while there are many. When a line is no JSON object, or the service
    fails, what came before it is stored, nothing after it is, and a sentence says which line it was.

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
            print_json(event_form(stored))
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

    async def append(self, batch: int) -> None:
        """Append everything that comes, in batches of so many lines at most."""
        started = time.perf_counter()
        try:
            with progress(self._output) as bar:
                task = bar.add_task("append", total=None)
                async for lines in _Input(batch).batches():
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

    async def _append(self, lines: list[bytes]) -> None:
        """Append a batch: up to the first line that is no JSON object, and then say which that is."""
        events: list[NewEvent] = []
        problem, done = None, 0
        for line in lines:
            text, problem = _json_object(line)
            if problem is not None:
                break
            if text:
                events.append(NewEvent(text, actor_id=self._actor, type=self._type))
            done += 1
        if events:
            await self._store(events)
        self._lines += done
        if problem is not None:
            raise CommandError(f"line {self._lines + 1:,} {problem}")

    async def _store(self, events: list[NewEvent]) -> None:
        storing = asyncio.ensure_future(self._client.append_batch(self._session_id, events))
        try:
            await asyncio.shield(storing)
        finally:  # on Ctrl-C, too, so that it can be said what is stored
            stored = await storing
            self._events += len(events)
            self._first = self._first or stored.first_server_seq
            self._last = stored.last_server_seq

    def _cut_short(self, error: BaseException) -> CommandError:
        """Return the error that says what went wrong, and how much is stored."""
        stored = f"the {self._events:,} events before are stored" if self._events else "nothing was stored"
        go_on = f"go on with line {self._lines + 1:,}: tail -n +{self._lines + 1} …" if self._lines else "try again"
        match error:
            case CommandError():
                return CommandError(f"{error}; {stored}, nothing after it is", error.status)
            case ServiceError(side_effects="unknown"):
                return CommandError(
                    f"{error}; {stored}, and some of the next may be: look with collab list "
                    f"{self._session_id} --since {self._last}",
                    ExitStatus.UNAVAILABLE,
                )
            case ServiceError():
                status = status_of(error)
                return CommandError(f"{error}; {stored}; {go_on}", status)
        return CommandError(f"interrupted; {stored}; {go_on}", ExitStatus.INTERRUPTED)


def _json_object(line: bytes) -> tuple[str, str | None]:
    """Return the text of a line, and what keeps it from being a JSON object; a blank line has no text."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return "", "is not UTF-8"
    return text, json_object_problem(text) if text else None


class _Input:
    """The lines of standard input, read ahead by a thread for which nothing has to wait when the command ends."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._ended = False
        self._error: CommandError | None = None
        self._room = threading.Condition()
        """Guards what stands above; told when there is room again."""
        self._changed = asyncio.Event()
        threading.Thread(target=self._read, daemon=True, name="standard-input").start()

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Yield what has come, as soon as there is something, and so many lines at most."""
        while True:
            lines = self._take()
            if lines:
                yield lines
            elif self._error is not None:
                raise self._error
            elif self._ended:
                return
            else:
                await self._changed.wait()

    def _take(self) -> list[bytes]:
        with self._room:
            self._changed.clear()
            lines: list[bytes] = []
            size = 0
            while self._lines and len(lines) < self._batch:
                size += len(self._lines[0])
                if lines and size > _BATCH_BYTES:
                    break
                lines.append(self._lines.popleft())
                self._bytes -= len(lines[-1])
            self._room.notify()
            return lines

    def _read(self) -> None:
        """Read to the end, as far ahead as there is room."""
        error = None
        try:
            while line := sys.stdin.buffer.readline(_LINE_BYTES):
                if len(line) == _LINE_BYTES:
                    error = CommandError(f"a line is longer than {_LINE_BYTES:,} bytes")
                    break
                with self._room:
                    self._room.wait_for(lambda: self._bytes < _AHEAD_BYTES)
                    self._lines.append(line)
                    self._bytes += len(line)
                    if len(self._lines) == 1:
                        self._wake()
        except OSError as reason:
            error = CommandError(f"cannot read standard input: {reason.strerror}")
        with self._room:
            self._error, self._ended = error, True
            self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the command has ended meanwhile
            self._loop.call_soon_threadsafe(self._changed.set)
