"""A client that makes one unary gRPC call again and again, and costs a fraction of what the server does.

The grpc library takes as much of the machine for a call as the server: with both on two cores, it is the client that is
measured. This one knows its request beforehand, and only looks for the frames that end calls (RFC 9113): the rates that
it finds are within a few per cent of those of `h2load`, a client in C.
"""

import asyncio
import struct
import time
from collections import Counter
from typing import cast

from tests.http2 import (
    ACK,
    DATA,
    EMPTY_SETTINGS,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    LARGEST_WINDOW,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    message_of,
)

_FIRST_DYNAMIC = 62
"""The index of the header that was added last (RFC 7541, section 2.3.3)."""


class Repeated(asyncio.Protocol):
    """A connection with so many calls at once, each of which is made again when it has ended."""

    def __init__(self, address: str, path: str, request: bytes, *, at_once: int, timeout: str | None = None) -> None:
        """Prepare.

        Args:
            address: The server's.
            path: Of the method.
            request: The message.
            at_once: Calls in progress.
            timeout: What to tell the server of how long the answer is waited for, such as "250m"; nobody does.
        """
        self.answers = 0
        """Calls that were answered."""
        self.failures: Counter[str] = Counter()
        """Calls that ended otherwise: `status` or `reset`."""
        self.seconds: list[float] = []
        """How long each answered call took."""
        self.closed = asyncio.get_running_loop().create_future()
        more = [("grpc-timeout", timeout)] if timeout is not None else []
        headers = [(":path", path), (":authority", address), ("content-type", "application/grpc"), ("te", "trailers")]
        headers += more
        names = b"".join(_indexed(header) for header in headers)
        again = bytes(0x80 | _FIRST_DYNAMIC + place for place in reversed(range(len(headers))))
        data = message_of(request)
        assert len(data) <= 16_384
        self._first = _request_frames(_POST_HTTP + names, data)
        self._again = _request_frames(_POST_HTTP + again, data)
        self._size = len(data)
        self._address = address
        self._room = INITIAL_WINDOW
        self._to_begin = at_once
        self._begun: dict[int, float] = {}
        self._answered: set[int] = set()
        self._next_stream = 1
        self._stopping = False
        self._unread = b""

    async def connect(self) -> None:
        """Connect to the server and begin."""
        host, _, port = self._address.rpartition(":")
        await asyncio.get_running_loop().create_connection(lambda: self, host, int(port))

    def stop(self) -> None:
        """Make no more calls."""
        self._stopping = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello, and make the first calls."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        whole = struct.pack(">I", LARGEST_WINDOW - INITIAL_WINDOW)
        self._transport.write(PREFACE + EMPTY_SETTINGS + frame(WINDOW_UPDATE, 0, 0, whole))
        self._begin()

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Take frames, and begin as many calls as have ended."""
        data = self._unread + data
        place, end = 0, len(data)
        now = time.perf_counter()
        while end - place >= 9:
            payload = place + 9
            behind = payload + (data[place] << 16 | data[place + 1] << 8 | data[place + 2])
            if behind > end:
                break
            kind, flags = data[place + 3], data[place + 4]
            if kind in (DATA, RST_STREAM) or (kind == HEADERS and flags & END_STREAM):
                self._take(kind, flags, int.from_bytes(data[place + 5 : payload], "big"), now)
            elif kind == WINDOW_UPDATE and data[place + 5 : payload] == b"\0\0\0\0":
                self._room += int.from_bytes(data[payload:behind], "big")
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self._transport.write(frame(kind, ACK, 0, data[payload:behind] if kind == PING else b""))
            place = behind
        self._unread = data[place:]
        if self._to_begin and not self._stopping:
            self._begin()

    def _take(self, kind: int, flags: int, stream: int, now: float) -> None:
        if kind == DATA:
            self._answered.add(stream)
        if kind == RST_STREAM or flags & END_STREAM:
            begun = self._begun.pop(stream, None)
            if begun is None:
                return  # a reset behind the end
            self._to_begin += 1
            if stream in self._answered:
                self.answers += 1
                self.seconds.append(now - begun)
            else:
                self.failures["reset" if kind == RST_STREAM else "status"] += 1
            self._answered.discard(stream)

    def _begin(self) -> None:
        frames: list[bytes] = []
        now = time.perf_counter()
        while self._to_begin and self._room >= self._size:
            number = struct.pack(">I", self._next_stream)
            head, data = self._again if self._next_stream > 1 else self._first
            frames += head[0], number, head[1], data[0], number, data[1]
            self._begun[self._next_stream] = now
            self._next_stream += 2
            self._room -= self._size
            self._to_begin -= 1
        self._transport.write(b"".join(frames))


_POST_HTTP = b"\x83\x86"
"""`:method: POST` and `:scheme: http`, from the static table (RFC 7541, appendix A)."""

_Split = tuple[bytes, bytes]
"""A frame before and behind the number of its stream."""


def _request_frames(headers: bytes, data: bytes) -> tuple[_Split, _Split]:
    of_headers, of_data = frame(HEADERS, END_HEADERS, 0, headers), frame(DATA, END_STREAM, 0, data)
    return (of_headers[:5], of_headers[9:]), (of_data[:5], of_data[9:])


def _indexed(header: tuple[str, str]) -> bytes:
    """Return a header as a literal that is added to the dynamic table (RFC 7541, section 6.2.1)."""
    return b"".join((b"\x40", *(struct.pack("B", len(text)) + text.encode() for text in header)))
