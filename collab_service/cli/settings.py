"""Options that several commands share, and what they default to."""

import os
from pathlib import Path
from typing import Annotated

import typer

from collab_service.logs import LogFormat

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="COLLAB_DATABASE_URL",
        metavar="URL",
        help="The PostgreSQL database: postgresql://user:password@host:5432/database. Any libpq URL works.",
        show_default=False,
    ),
]


AllowUnauthenticated = Annotated[
    bool,
    typer.Option(
        "--allow-unauthenticated",
        envvar="COLLAB_ALLOW_UNAUTHENTICATED",
        help="Listen on addresses that other machines reach, although anybody there can then read and write.",
    ),
]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option(
        envvar="COLLAB_CORS_ORIGIN",
        metavar="ORIGIN",
        help="An origin whose pages may call the gateway from a browser, such as https://app.example; can be repeated.",
        show_default="none",
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(envvar="COLLAB_LOG_FORMAT", help="Log lines for people or machines; auto asks the terminal."),
]
MaxConnections = Annotated[
    int,
    typer.Option(
        envvar="COLLAB_MAX_CONNECTIONS",
        min=1,
        max=2**31 - 1,
        help="Connections at once, at each port of a process.",
        rich_help_panel="Limits",
    ),
]
MaxBodyBytes = Annotated[
    int,
    typer.Option(
        envvar="COLLAB_MAX_BODY_BYTES",
        min=1,
        max=2**31 - 1,
        help="The body of an HTTP request.",
        rich_help_panel="Limits",
    ),
]
ShutdownGrace = Annotated[
    float,
    typer.Option(
        envvar="COLLAB_SHUTDOWN_GRACE",
        metavar="SECONDS",
        min=0,
        help="How long calls in progress may finish on a stop.",
    ),
]


def default_data_dir() -> Path:
    """Return where the PostgreSQL of our own keeps its data unless told otherwise.

    For root a directory that other users may enter, since PostgreSQL runs as another user there; for others the place
    of the XDG Base Directory Specification.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/collab-service")
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "collab-service"
