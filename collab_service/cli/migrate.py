"""`collab migrate`."""

import typer

from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.settings import DatabaseUrl


def migrate(database_url: DatabaseUrl = None) -> None:
    """Bring a database's schema up to date.

    Safe to run again, and by several at once: one works, the others wait and find nothing to do. `collab serve` refuses
    a database whose schema is older than it needs; a newer one is fine, so migrate first and then replace the servers.
    The PostgreSQL that `collab serve` keeps itself is migrated when it starts.

    Example: `collab migrate --database-url postgresql://collab@localhost/collab`
    """
    # Imported only here, since it takes half a second that no other command should wait for.
    from collab_service.model.errors import StorageUnavailable
    from collab_service.storage import schema
    from collab_service.storage.driver_errors import cause_of

    if not database_url:
        raise CommandError("which database? Give --database-url or set COLLAB_DATABASE_URL", ExitStatus.USAGE)
    check_database_url(database_url)
    try:
        before, after = schema.migrate(database_url)
    except StorageUnavailable as error:
        raise CommandError(f"the database could not be migrated: {cause_of(error)}") from error
    except schema.UnsuitableDatabase as error:
        raise CommandError(str(error)) from error
    if before == after:
        typer.echo(f"The schema is up to date (revision {after}).")
    else:
        typer.echo(f"The schema went from {f'revision {before}' if before else 'nothing'} to revision {after}.")


def check_database_url(url: str) -> None:
    """Raise `CommandError` when `url` is no PostgreSQL URL."""
    from collab_service.storage.database import url_problem

    if (problem := url_problem(url)) is not None:
        raise CommandError(f"the database URL {problem}", ExitStatus.USAGE)
