"""The command `collab`."""

import io
import sys

import typer

from collab_service import __version__
from collab_service.cli import migrate, replay, serve, tail
from collab_service.cli.failure import told_in_a_sentence

app = typer.Typer(
    name="collab",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(migrate.migrate)
app.command()(replay.replay)
app.command()(tail.tail)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"collab-service {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Collaboration sessions as durable, ordered, append-only event logs.

    Start a service with `collab serve`, then write a recorded session into it with `collab replay`
    and watch one with `collab tail`.
    """


def main() -> None:
    """Run the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is escaped
    with told_in_a_sentence():
        app()
