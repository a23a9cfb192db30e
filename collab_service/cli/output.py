"""What commands print: columns and colours for people on a terminal, plain lines in pipes, JSON lines for programs."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from collab_service.client import Event, Session
from collab_service.client.json_form import iso_time, line_form, session_form


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[
    Output,
    typer.Option("--output", "-o", envvar="COLLAB_OUTPUT", help="Text for people, or one JSON object a line."),
]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a list."""

    title: str
    width: int
    """Characters at least, on a terminal."""
    style: str = ""
    right: bool = False


class Lines:
    """Prints a list line by line, as it comes."""

    def __init__(self, output: Output, columns: Sequence[Column], cells: Callable[[Any], Sequence[str]]) -> None:
        """Prepare.

        Args:
            output: For whom.
            columns: The columns; the last one is cut at the edge of a terminal.
            cells: Returns the columns of an item, for people.
        """
        self._output = output
        self._columns = columns
        self._cells = cells
        self._console = Console(highlight=False)
        self._titled = False

    def print(self, item: Any) -> None:
        """Print a session or an event."""
        if self._output is Output.JSON:
            print_json(session_form(item) if isinstance(item, Session) else line_form(item))
        elif self._console.is_terminal:
            if not self._titled:
                self._titled = True
                self._print_columns([column.title for column in self._columns], lambda column: "bold")
            self._print_columns(list(map(printable, self._cells(item))), lambda column: column.style)
        else:
            sys.stdout.write("  ".join(map(printable, self._cells(item))) + "\n")

    def flush(self) -> None:
        """Let what was printed be seen."""
        sys.stdout.flush()

    def _print_columns(self, cells: Sequence[str], style_of: Callable[[Column], str]) -> None:
        line = Text()
        for column, cell in zip(self._columns, cells, strict=True):
            if line:
                line.append("  ")
            line.append(cell.rjust(column.width) if column.right else cell.ljust(column.width), style_of(column))
        line.rstrip()
        self._console.print(line, no_wrap=True, overflow="ellipsis")


def event_lines(output: Output) -> Lines:
    """Return a list of events."""
    columns = (
        Column("seq", 6, "cyan", right=True),
        Column("time", 27, "dim"),
        Column("actor", 10, "green"),
        Column("type", 8, "magenta"),
        Column("payload", 0),
    )
    return Lines(output, columns, _event_cells)


def session_lines(output: Output) -> Lines:
    """Return a list of sessions."""
    columns = (
        Column("id", 6, "cyan", right=True),
        Column("events", 9, right=True),
        Column("last active", 27, "dim"),
        Column("language", 8),
        Column("owner", 12, "green"),
        Column("room", 0, "bold"),
    )
    return Lines(output, columns, _session_cells)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in UTF-8 whatever the terminal's encoding is."""
    text = msgspec.json.encode(value)
    if not sys.stdout.isatty():
        sys.stdout.buffer.write(text + b"\n")
        return
    # The same value, in which nothing that an author wrote can move the cursor.
    shown = (c if c.isprintable() or c == "\t" else json.dumps(c)[1:-1] for c in text.decode())
    sys.stdout.buffer.write("".join(shown).encode() + b"\n")
    sys.stdout.flush()


def say(sentence: str) -> None:
    """Print a result for people."""
    Console(highlight=False, soft_wrap=True).print(Text(printable(sentence)))


def printable(text: str) -> str:
    """Return text in which nothing that an author wrote can move the cursor.

    Line breaks become spaces, and other characters that do not only show become their escapes.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode() for c in text
    )


class _Rate(ProgressColumn):
    """How fast it goes, all in all."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="cyan")


def progress(output: Output = Output.TEXT, *, hidden: bool = False) -> Progress:
    """Return a progress bar with rate and time left, on standard error; it is seen on a terminal only, and goes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    hidden = hidden or output is Output.JSON or not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=hidden)


def events_in_words(count: int) -> str:
    """Return a number of events, as text."""
    return f"{count:,} event" if count == 1 else f"{count:,} events"


def rate(count: int, seconds: float) -> str:
    """Return how much took how long, as text."""
    return f"{events_in_words(count)} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def _event_cells(event: Event) -> Sequence[str]:
    return (
        str(event.server_seq),
        iso_time(event.created_at),
        "-" if event.actor_id is None else event.actor_id,
        "-" if event.type is None else event.type,
        event.payload if isinstance(event.payload, str) else f"{len(event.payload):,} bytes",
    )


def _session_cells(session: Session) -> Sequence[str]:
    return (
        str(session.id),
        f"{session.last_server_seq:,}",
        iso_time(session.last_active),
        "-" if session.language_id is None else str(session.language_id),
        "-" if session.owner_id is None else session.owner_id,
        "-" if session.room is None else session.room,
    )
