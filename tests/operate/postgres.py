"""A PostgreSQL as operators run it: on TCP, with a standby, promoted, killed."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

from collab_service.storage.embedded.accounts import Account

PASSWORD = "secret"


class Postgres:
    """One server of its own on loopback; leaving the context kills it."""

    def __init__(self, programs: Path, directory: Path, account: Account) -> None:
        """Prepare.

        Args:
            programs: Where PostgreSQL's programs are.
            directory: For its files; made, and given to the account.
            account: Whom it runs as.
        """
        self._programs = programs
        self._account = account
        self.directory = directory
        directory.mkdir(mode=0o700)
        os.chown(directory, account.uid, account.gid)
        self.data = directory / "data"
        self.address = f"127.0.0.1:{_free_port()}"

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"postgresql://collab:{PASSWORD}@{self.address}/postgres"

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs as the server's user, with the server's directory as its own."""
        log = self.directory / f"{program}.log"
        with log.open("w") as output:  # not a pipe, which a server that is started would keep open
            subprocess.run(
                [self._programs / program, *arguments], cwd=self.directory, stdout=output, stderr=subprocess.STDOUT,
                timeout=60, check=True, start_new_session=True, **self._account.as_this(),
            )  # fmt: skip
        return log.read_text()

    def create(self) -> None:
        """Make an empty one."""
        password = self.directory / "password"
        password.write_text(PASSWORD)
        os.chown(password, self._account.uid, self._account.gid)
        self.run(
            "initdb", "--pgdata=data", "--username=collab", f"--pwfile={password}", "--auth=scram-sha-256",
            "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip

    def copy_of(self, other: "Postgres") -> None:
        """Make it a standby of another."""
        self.run(
            "pg_basebackup", f"--dbname={other.url}", "--pgdata=data", "--checkpoint=fast", "--write-recovery-conf"
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        host, _, port = self.address.partition(":")
        options = f"-c listen_addresses={host} -c port={port} -c unix_socket_directories="
        self.run("pg_ctl", "start", "--wait", "--pgdata=data", "--log=server.log", f"--options={options}")

    def promote(self) -> None:
        """Make a standby a server that takes writes, and wait until it is one."""
        self.run("pg_ctl", "promote", "--wait", "--pgdata=data")

    def kill(self) -> None:
        """Kill the main process, after which the others end by themselves."""
        os.kill(int((self.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if (self.data / "postmaster.pid").exists():
            subprocess.run(
                [self._programs / "pg_ctl", "stop", "--mode=immediate", "--silent", "--pgdata=data"],
                cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
                **self._account.as_this(),
            )  # fmt: skip
        shutil.rmtree(self.directory)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
