"""Options that several commands share, and what they default to."""

import os
from pathlib import Path
from typing import Annotated

import typer

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="COLLAB_DATABASE_URL",
        metavar="URL",
        help="The PostgreSQL database: postgresql://user:password@host:5432/database. Any libpq URL works.",
        show_default=False,
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
