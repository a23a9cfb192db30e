"""`collab` as a process that is forked from one which has imported everything.

Loading the service takes a second or two of a core on a slow machine, and the tests start it some hundred times. What
comes after loading is the same: a process of its own, with its own arguments, environment, files and signals.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import collab_service

_ALSO = ("alembic.command", "alembic.ddl.postgresql", "sqlalchemy.dialects.postgresql.psycopg")
"""What is imported by name, when it is needed."""
_MOST_FILES = 1_024
_STATUS_BYTES = 4


class WarmProcess:
    """A `collab` command that runs; the part of `subprocess.Popen` that the tests use."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str]
    ) -> None:
        """Start it.

        Args:
            arguments: What follows `collab` on the command line.
            cwd: Its working directory.
            env: Its environment.
            stdout: Where its standard output goes; None: nowhere.
            stderr: Where its standard error goes.
        """
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._status, status = os.pipe()
        try:
            with open(os.devnull, "r+") as nothing:
                files = (nothing.fileno(), (stdout or nothing).fileno(), stderr.fileno(), status)
                _the_nest().fork({"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}, files)
        finally:
            os.close(status)
        self.pid = int.from_bytes(os.read(self._status, _STATUS_BYTES), "little")
        assert self.pid, "the process that forks has ended"

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit status: that of `exit`, or a signal's number below 0."""
        status = self._look(None if timeout is None else timeout * 1000)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("collab", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _look(self, milliseconds: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            ready = poll.poll(milliseconds)
            with self._lock:
                if self.returncode is None and ready:
                    self.returncode = int.from_bytes(os.read(self._status, _STATUS_BYTES), "little", signed=True)
                    os.close(self._status)
        return self.returncode


class _Nest:
    """The process that forks, as others see it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # -P: it imports nothing from beside this file.
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(env),
            )
        atexit.register(self._close)

    def fork(self, order: Mapping[str, object], files: Sequence[int]) -> None:
        with self._lock:
            socket.send_fds(self._ours, [json.dumps(order).encode()], files)

    def _close(self) -> None:
        self._ours.close()
        self._process.wait()


_nest: _Nest | None = None
_nest_lock = threading.Lock()


def _the_nest() -> _Nest:
    global _nest
    with _nest_lock:
        if _nest is None:
            _nest = _Nest({**os.environ, "PYTHONWARNINGS": "error"})
        return _nest


def _main(control: socket.socket) -> None:
    """Fork whenever asked to, and tell the end of each child; end when nobody can ask any more."""
    for module in pkgutil.walk_packages(collab_service.__path__, "collab_service."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in _ALSO:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1
    statuses: dict[int, int] = {}

    def reap(*_: object) -> None:
        while statuses:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            _tell(statuses.pop(pid), os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is for pytest
    signal.signal(signal.SIGCHLD, reap)
    while True:
        order, files, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not order:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            control.detach()
            _become(json.loads(order), files)
            return
        statuses[pid] = files.pop()
        os.write(statuses[pid], pid.to_bytes(_STATUS_BYTES, "little"))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for file in files:
            os.close(file)


def _tell(file: int, status: int) -> None:
    try:
        os.write(file, status.to_bytes(_STATUS_BYTES, "little", signed=True))
    except BrokenPipeError:
        pass  # nobody wants to know
    finally:
        os.close(file)


def _become(order: dict[str, object], files: Sequence[int]) -> None:
    """Be the command, as `python -m collab_service` is; what it ends with ends the process."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.closerange(3, _MOST_FILES)
    arguments, environment = order["arguments"], order["env"]
    assert isinstance(arguments, list)
    assert isinstance(environment, dict)
    os.chdir(str(order["cwd"]))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module("collab_service", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        _main(asked)
