"""Which operating-system user PostgreSQL runs as, and what that user can reach."""

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the operating system."""

    name: str
    uid: int
    gid: int

    def as_this(self) -> dict[str, Any]:
        """Return the arguments with which `subprocess` runs a program as this user."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def unreachable(self, path: Path) -> Path | None:
        """Return the first directory on the way to `path` that this user may not enter, or None.

        Goes by the permission bits.
        """
        path = path.resolve()
        for directory in (*reversed(path.parents), path):
            if directory.is_dir() and not self._may(directory, stat.S_IXUSR):
                return directory
        return None

    def can_run(self, program: Path) -> bool:
        """Tell whether this user can reach and execute a program; goes by the permission bits."""
        return self.unreachable(program) is None and self._may(program, stat.S_IXUSR)

    def _may(self, path: Path, user_bit: int) -> bool:
        status = path.stat()
        if self.uid == 0:
            return True
        if status.st_uid == self.uid:
            return bool(status.st_mode & user_bit)
        if status.st_gid == self.gid:
            return bool(status.st_mode & (user_bit >> 3))
        return bool(status.st_mode & (user_bit >> 6))


def postgres_account() -> Account | None:
    """Return the user to run PostgreSQL as: this one, or for root, as which it refuses to run, another.

    None when there is nobody to run it as: PostgreSQL needs a user that the machine knows by name, and root is none.
    """
    if os.geteuid() != 0:
        try:
            return Account(pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), os.getegid())
        except KeyError:
            return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    return None
