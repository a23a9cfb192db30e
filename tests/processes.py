"""Running `collab` as its users do: as a process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.warm import WarmProcess

_FROM_HERE = [sys.executable, "-m", "collab_service"]
COLLAB = _FROM_HERE
START_SECONDS = 60.0
_starts_are_warm = False


def let_starts_be_warm() -> None:
    """Fork commands from a process that has loaded them, where that makes no difference; not for what measures."""
    global _starts_are_warm
    _starts_are_warm = True


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without settings of ours, plus `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COLLAB_")}
    # The gateway's own address is left to whoever else runs here.
    ours = {"PYTHONWARNINGS": "error", "NO_COLOR": "1", "COLUMNS": "200", "COLLAB_HTTP_ADDRESS": "127.0.0.1:0"}
    return {**kept, **ours, **more}


def collab(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a `collab` command to its end."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = _start(arguments, cwd=Path.cwd(), environment=environment, stdout=output, stderr=errors)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([*COLLAB, *arguments], status, output.read(), errors.read())


def _start(
    arguments: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    stdout: IO[str] | None,
    stderr: IO[str],
) -> "subprocess.Popen[bytes] | WarmProcess":
    env = clean_environment(**environment)
    python_matters = any(name.startswith("PYTHON") for name in environment)
    # A process that starts workers has itself loaded little.
    starts_workers = "--workers" in arguments or "COLLAB_WORKERS" in environment
    if _starts_are_warm and COLLAB is _FROM_HERE and not python_matters and not starts_workers:
        return WarmProcess(arguments, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
    return subprocess.Popen([*COLLAB, *arguments], stdout=stdout, stderr=stderr, cwd=cwd, env=env)


class ServingProcess:
    """A `collab` command that serves until it is told to stop; its log lines are kept."""

    def __init__(self, command: str, *arguments: str, cwd: Path, **environment: str) -> None:
        """Start it; entering the context waits until it serves."""
        self.lines: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        reading, writing = os.pipe()
        with open(writing, "w") as log:
            self.process = _start(
                (command, "--log-format", "json", *arguments),
                cwd=cwd,
                environment=environment,
                stdout=None,
                stderr=log,
            )
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, file: int) -> None:
        with open(file) as log:
            for line in log:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"event": line.rstrip("\n"), "raw": True}
                with self._changed:
                    self.lines.append(entry)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, event: str, seconds: float = START_SECONDS, **fields: Any) -> dict[str, Any]:
        """Wait for a log line with the message `event` and the given fields, and return it."""
        wanted = {"event": event, **fields}
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for line in self.lines:
                    if wanted.items() <= line.items():
                        return line
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    raise AssertionError(f"no line with {wanted} in {self.lines}")
                self._changed.wait(left)

    @property
    def http_address(self) -> str:
        """Where its gateway listens."""
        address: str = self.wait_for("serving")["http_address"]
        return address

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30) -> int:
        """Stop it and return its exit status."""
        if self.process.poll() is None:
            self.send(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 30) -> int:
        """Wait for its end and return its exit status."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def text(self) -> str:
        """Return everything it has said."""
        return "\n".join(json.dumps(line) for line in self.lines)

    def __enter__(self) -> Self:
        try:
            self.wait_for("serving")
        except AssertionError:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        if error is not None:
            print(self.text())  # for the report of what has failed


class ServeProcess(ServingProcess):
    """A `collab serve` on ports of its own."""

    def __init__(self, *arguments: str, cwd: Path, grpc_address: str = "127.0.0.1:0", **environment: str) -> None:
        """Start it; entering the context waits until it serves."""
        super().__init__("serve", "--grpc-address", grpc_address, *arguments, cwd=cwd, **environment)

    @property
    def grpc_address(self) -> str:
        """Where it listens."""
        address: str = self.wait_for("serving")["grpc_address"]
        return address


class GatewayProcess(ServingProcess):
    """A `collab gateway` on a port of its own."""

    def __init__(
        self, target: str, *arguments: str, cwd: Path, http_address: str = "127.0.0.1:0", **environment: str
    ) -> None:
        """Start it; entering the context waits until it serves."""
        addresses = ("--target", target, "--http-address", http_address)
        super().__init__("gateway", *addresses, *arguments, cwd=cwd, **environment)
