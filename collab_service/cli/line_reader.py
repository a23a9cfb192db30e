"""Standard input, line by line, while something else goes on."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from collab_service.cli.failure import CommandError

_BATCH_BYTES = 2 * 1024 * 1024
"""How much is taken at once, where the service takes batches of 4 MiB unless configured."""
_LINE_BYTES = 64 * 1024 * 1024
"""A longer line is no event: the service takes payloads of 1 MiB, unless configured."""
_AHEAD_BYTES = 8 * 1024 * 1024
"""How much is read while a batch is being appended."""
_LINE_OVERHEAD = 64
"""Bytes that a line takes in memory besides its own."""
_CHUNK_BYTES = 64 * 1024


class LineReader:
    """Reads the lines of standard input ahead, in a thread for which nothing has to wait when the command ends."""

    def __init__(self, batch: int) -> None:
        """Begin to read; `batch` lines at most are taken at once."""
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._ended = False
        self._error: CommandError | None = None
        self._room = threading.Condition()
        """Guards what stands above; told when there is room again."""
        self._changed = asyncio.Event()
        threading.Thread(target=self._read, daemon=True, name="standard-input").start()

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Yield what has come, as soon as there is something, and so many lines at most."""
        while True:
            lines = self._take()
            if lines:
                yield lines
                await asyncio.sleep(0)  # so that blank lines without end can be interrupted
            elif self._error is not None:
                raise self._error
            elif self._ended:
                return
            else:
                await self._changed.wait()

    def _take(self) -> list[bytes]:
        with self._room:
            self._changed.clear()
            lines: list[bytes] = []
            size = 0
            while self._lines and len(lines) < self._batch:
                size += len(self._lines[0])
                if lines and size > _BATCH_BYTES:
                    break
                lines.append(self._lines.popleft())
                self._bytes -= len(lines[-1]) + _LINE_OVERHEAD
            self._room.notify()
            return lines

    def _read(self) -> None:
        """Read to the end, as far ahead as there is room."""
        error = None
        try:
            for lines in _chunks_of_lines():
                with self._room:
                    self._room.wait_for(lambda: self._bytes < _AHEAD_BYTES)
                    self._lines += lines
                    self._bytes += sum(len(line) + _LINE_OVERHEAD for line in lines)
                    self._wake()
        except CommandError as reason:
            error = reason
        except OSError as reason:
            error = CommandError(f"cannot read standard input: {reason.strerror}")
        with self._room:
            self._error, self._ended = error, True
            self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the command has ended meanwhile
            self._loop.call_soon_threadsafe(self._changed.set)


def _chunks_of_lines() -> Iterator[list[bytes]]:
    """Yield the lines of standard input as they come.

    Not through `sys.stdin.buffer`: a thread that waits in it holds its lock, and Python aborts when it ends meanwhile.
    """
    file = sys.stdin.fileno()
    number = 1
    begun = bytearray()
    while chunk := os.read(file, _CHUNK_BYTES):
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = bytes(begun + lines[0])
            begun.clear()
            yield lines
            number += len(lines)
        begun += rest
        if len(begun) > _LINE_BYTES:
            raise CommandError(f"line {number:,} is longer than {_LINE_BYTES:,} bytes")
    if begun:
        yield [bytes(begun)]
