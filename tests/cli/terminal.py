"""A command on a terminal, as a person sees it."""

import os
import pty
import re
import signal
import subprocess
import termios
import threading
from types import TracebackType
from typing import Self

from tests.processes import COLLAB, clean_environment
from tests.rpc.calls import TIMEOUT

_AGAIN = 5.0
"""Seconds after which a person presses Ctrl-C again."""

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def without_escapes(text: str) -> str:
    """Return text without the sequences that colour it or move the cursor."""
    return _ESCAPE.sub("", text)


class Terminal:
    """A command whose input and output are a terminal."""

    def __init__(self, address: str, *arguments: object, columns: int = 100, **environment: str) -> None:
        """Start it."""
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, columns))
        variables = clean_environment(COLLAB_TARGET=address, TERM="xterm-256color")
        for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR"):
            variables.pop(name, None)
        self.process = subprocess.Popen(
            [*COLLAB, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**variables, **environment},
        )
        os.close(slave)
        self.text = ""
        """What was shown so far, with all escape sequences."""
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        parts = b""
        try:
            while data := os.read(self._master, 65536):
                parts += data
                with self._changed:
                    self.text = parts.decode(errors="replace")
                    self._changed.notify_all()
        except OSError:  # what a terminal says when nobody writes to it any more
            pass
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, words: str) -> None:
        """Wait until this is shown."""
        with self._changed:
            self._changed.wait_for(lambda: words in self.text or self._ended, TIMEOUT)
            assert words in self.text, self.text

    def press(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, words: str) -> None:
        """Press Ctrl-C as a person does where nothing happens: Python can miss one just before it waits for a line.

        Once this is shown, no more: one that came while Python ends would be what ends it.
        """
        with self._changed:
            while words not in self.text and not self._ended:
                self.interrupt()
                self._changed.wait_for(lambda: words in self.text or self._ended, _AGAIN)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its status and everything that was shown, without escape sequences."""
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status, without_escapes(self.text).replace("\r\n", "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.end()
        os.close(self._master)
