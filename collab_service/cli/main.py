"""The command `collab`."""

import io
import sys

import typer

from collab_service import __version__
from collab_service.cli import (
    append,
    bench,
    doctor,
    export,
    gateway,
    import_,
    migrate,
    replay,
    serve,
    session,
    tail,
    verify,
)
from collab_service.cli.failure import CommandError, told_in_a_sentence

app = typer.Typer(
    name="collab",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SERVICE, _EVENTS, _FILES = "The service", "Sessions and events", "Files"
app.command(rich_help_panel=_SERVICE)(serve.serve)
app.command(rich_help_panel=_SERVICE)(gateway.gateway)
app.command(rich_help_panel=_SERVICE)(migrate.migrate)
app.command(rich_help_panel=_SERVICE)(doctor.doctor)
app.command(rich_help_panel=_SERVICE)(bench.bench)
app.add_typer(session.app, name="session", rich_help_panel=_EVENTS)
app.command(rich_help_panel=_EVENTS)(append.append)
app.command("list", rich_help_panel=_EVENTS)(tail.list_events)
app.command(rich_help_panel=_EVENTS)(tail.tail)
app.command(rich_help_panel=_EVENTS)(verify.verify)
app.command(rich_help_panel=_FILES)(export.export)
app.command("import", rich_help_panel=_FILES)(import_.import_session)
app.command(rich_help_panel=_FILES)(replay.replay)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"collab-service {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Collaboration sessions as durable, ordered, append-only event logs.

    Start a service with `collab serve`, then:

    * `collab session create --room minutes`

    * `collab append minutes --json '{"text": "hello"}' --actor ada`

    * `collab tail minutes`

    A session is named by its number or its room. Exit status: 0 done, 1 it cannot be done, 2 wrong command line,
    3 the service cannot be used just now, 4 no such session, 5 the session is not as expected, 6 a check has failed,
    130 interrupted.
    """


def main() -> None:
    """Run the command."""
    with told_in_a_sentence():
        if sys.stdout is None:
            raise CommandError("standard output is closed, and there is nowhere to write to")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is escaped
        try:
            app(prog_name="collab")
        finally:
            sys.stdout.flush()  # a disk that is full is told here, and not by Python at its end
