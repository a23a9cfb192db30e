"""The data directory: what lies where in it, and the lock that keeps a second `collab serve` out."""

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from collab_service.storage.embedded.accounts import Account

_SOCKET_PATH_MAX = 107
"""Bytes that the path of a Unix socket can have on Linux (`sun_path` in unix(7))."""
SOCKET_NAME = ".s.PGSQL.5432"


class EmbeddedError(Exception):
    """The PostgreSQL of our own cannot be used; the message is a sentence that says why and what to do."""


class DataDirectory:
    """A directory that holds one PostgreSQL cluster and what belongs to it.

    `lock` is held while it is in use, `password` is the database password, `postgres` the cluster, `binaries` a copy of
    PostgreSQL where the installed one cannot be reached, `socket` where it listens, `postgres.log` its log.
    """

    def __init__(self, path: Path, owner: Account) -> None:
        """Create the directory where it is missing, and lock it.

        Args:
            path: The data directory.
            owner: Whom PostgreSQL will run as.

        Raises:
            EmbeddedError: It is in use, cannot be made, or cannot be entered by `owner`.
        """
        self.path = path.expanduser().resolve()
        self.owner = owner
        with self.os_errors():
            if not self.path.exists():
                self.path.mkdir(parents=True)
                # Another user's PostgreSQL passes through; the files have their own permissions.
                self.path.chmod(0o700 if owner.uid == os.geteuid() else 0o711)
            self._lock = self._take_lock()
        if (closed := owner.unreachable(self.path)) is not None:
            self.release()
            raise EmbeddedError(
                f"PostgreSQL does not run as root, so it runs as the user {owner.name}, who may not enter {closed}; "
                "choose a data directory that everybody may enter, such as --data-dir /var/lib/collab-service, "
                f"or allow it with: chmod o+x {closed}"
            )

    @contextmanager
    def os_errors(self) -> Iterator[None]:
        """Turn errors of the operating system, such as a disk that is full, into `EmbeddedError`."""
        try:
            yield
        except OSError as error:
            # What copies many files tells of each in its arguments.
            raise EmbeddedError(f"cannot use the data directory {self.path}: {error.strerror or error}") from error

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise EmbeddedError(
                f"the data directory {self.path} is in use by another collab serve (process {holder}); "
                "stop that one, or choose another with --data-dir"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return descriptor

    def release(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)

    @property
    def cluster(self) -> Path:
        """Where PostgreSQL keeps its files."""
        return self.path / "postgres"

    @property
    def binaries(self) -> Path:
        """Where a copy of PostgreSQL's programs goes when it needs one."""
        return self.path / "binaries"

    @property
    def log(self) -> Path:
        """PostgreSQL's own log."""
        return self.path / "postgres.log"

    def socket_directory(self) -> Path:
        """Return the directory of the socket, entered by the owner alone; created where it is missing.

        That is a temporary one where the path is too long for a socket, or has a comma or a double quote, with which
        PostgreSQL's lists of hosts and of socket directories would be something else.
        """
        directory = self.path / "socket"
        if len(os.fsencode(directory / SOCKET_NAME)) > _SOCKET_PATH_MAX or set(',"') & set(str(directory)):
            directory = Path(tempfile.mkdtemp(prefix="collab-"))
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
        self.give_to_owner(directory)
        return directory

    def password(self) -> str:
        """Return the password of the database, made up when first asked for.

        Raises:
            EmbeddedError: There is a cluster, but the password that it was made with is gone.
        """
        file = self.path / "password"
        if not file.exists() or not file.read_text():
            if self.cluster.exists():
                raise EmbeddedError(
                    f"{file} is missing, which has the password of the PostgreSQL there; put it back from a backup"
                )
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_urlsafe(32))
        return file.read_text()

    def give_to_owner(self, path: Path) -> None:
        """Make `path` PostgreSQL's own."""
        if self.owner.uid != os.geteuid():
            os.chown(path, self.owner.uid, self.owner.gid)
