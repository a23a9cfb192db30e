"""Clients that speak just enough HTTP/2 (RFC 9113) to follow sessions, at little cost, and to misbehave.

The grpc library reads ahead, answers pings, and costs as much for each message as the server does. These read only
when told to, leave pings unanswered when told to, and take a message in a few microseconds.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Self, cast

from collab_service.v1 import collab_service_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4
_CANCEL = 8
_LARGEST_FRAME = 16_384
LARGEST_WINDOW = 2**31 - 1
INITIAL_WINDOW = 65_535

OnMessage = Callable[[int, bytes], None]
"""Called with the number of the stream on its connection, from 0, and the bytes of a message."""


class _Connection(asyncio.Protocol):
    """A connection to a server, with gRPC calls on it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._unread = bytearray()
        self._begun = 0
        self.transport: asyncio.Transport
        self.begun_streams = 0
        """Calls to which the server has begun to answer."""
        self.ended_streams = 0
        """Calls that the server has ended."""
        self.closed = asyncio.get_running_loop().create_future()

    async def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        await asyncio.get_running_loop().create_connection(lambda: self, host, int(port))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self.transport.write(PREFACE)
        self._say_hello()

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        unread = self._unread
        unread += data
        place = 0
        while len(unread) - place >= 9:
            length = int.from_bytes(unread[place : place + 3], "big")
            end = place + 9 + length
            if len(unread) < end:
                break
            kind, flags = unread[place + 3], unread[place + 4]
            self._take(kind, flags, int.from_bytes(unread[place + 5 : place + 9], "big"), unread[place + 9 : end])
            place = end
        del unread[:place]

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        if not self.closed.done():
            self.closed.set_result(None)

    def _say_hello(self) -> None:
        self._send(SETTINGS, 0, 0)

    def _begin(self, path: str) -> int:
        """Begin a call of the method with this path and return its stream."""
        stream_id = 2 * self._begun + 1
        self._begun += 1
        headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", self._address),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
        self._send(HEADERS, END_HEADERS, stream_id, b"".join(_field(*header) for header in headers))
        return stream_id

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytearray) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._send(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self._send(PING, ACK, 0, bytes(payload))
        elif kind == HEADERS and not flags & END_STREAM:
            self.begun_streams += 1
        elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            self.ended_streams += 1

    def _send(self, kind: int, flags: int, stream_id: int, payload: bytes = b"") -> None:
        self.transport.write(frame(kind, flags, stream_id, payload))


class FollowConnection(_Connection):
    """A connection with `ListEvents` calls on it."""

    def __init__(self, address: str, on_message: OnMessage, *, window: int, answer_pings: bool) -> None:
        super().__init__(address)
        self._on_message = on_message
        self._window = window
        self._answer_pings = answer_pings
        self._streams: dict[int, bytearray] = {}

    @classmethod
    async def open(
        cls, address: str, on_message: OnMessage, *, window: int = LARGEST_WINDOW, answer_pings: bool = True
    ) -> Self:
        """Connect.

        Args:
            address: The server's.
            on_message: What to do with messages.
            window: How many bytes the server may send on a stream; it never gets more.
            answer_pings: Whether to show signs of life.
        """
        connection = cls(address, on_message, window=window, answer_pings=answer_pings)
        await connection._connect()
        return connection

    def follow(self, request: pb.ListEventsRequest) -> int:
        """Call `ListEvents` and return the stream's number."""
        stream_id = self._begin("/collab_service.v1.CollabService/ListEvents")
        self._streams[stream_id] = bytearray()
        self._send(DATA, END_STREAM, stream_id, message_of(request.SerializeToString()))
        return stream_id // 2

    def reset(self, number: int) -> None:
        """Give up on a stream, by its number."""
        self._send(RST_STREAM, 0, 2 * number + 1, struct.pack(">I", _CANCEL))

    def grow_windows(self, size: int) -> None:
        """Let the server send so many bytes more on every stream."""
        for stream_id in self._streams:
            self._send(WINDOW_UPDATE, 0, stream_id, struct.pack(">I", size))

    def _say_hello(self) -> None:
        self._send(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, self._window))
        self._send(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - INITIAL_WINDOW))

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytearray) -> None:
        if kind == DATA:
            stream = self._streams[stream_id]
            stream += payload
            while len(stream) >= 5 and len(stream) >= (end := 5 + int.from_bytes(stream[1:5], "big")):
                self._on_message(stream_id // 2, bytes(stream[5:end]))
                del stream[:end]
        elif kind != PING or self._answer_pings:
            super()._take(kind, flags, stream_id, payload)


class UnfinishedRequests(_Connection):
    """A connection with calls that send their requests but for the last byte."""

    def __init__(self, address: str, *, takes_answers: bool) -> None:
        super().__init__(address)
        self._takes_answers = takes_answers
        self._window = INITIAL_WINDOW
        self._initial_window = INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self._unsent: dict[int, memoryview] = {}

    @classmethod
    async def open(cls, address: str, *, takes_answers: bool = True) -> Self:
        """Connect.

        Args:
            address: The server's.
            takes_answers: Whether the server may send messages.
        """
        connection = cls(address, takes_answers=takes_answers)
        await connection._connect()
        return connection

    @property
    def unfinished(self) -> int:
        """How many of its calls lack their end, and the server has not ended."""
        return len(self._unsent)

    @property
    def unsent(self) -> int:
        """How many bytes of its requests are to be sent before their last ones."""
        return sum(len(unsent) - 1 for unsent in self._unsent.values())

    def begin(self, path: str, request: bytes, before: bytes = b"") -> None:
        """Begin a call of a method, and its request; before it, send a whole one."""
        stream_id = self._begin(path)
        self._windows[stream_id], self._unsent[stream_id] = self._initial_window, memoryview(request)
        if before:
            self._send_data(stream_id, message_of(before))
        self._send_data(stream_id, head_of(request))

    def finish(self) -> int:
        """Send the last byte of all requests that lack nothing else, and return how many these are."""
        whole = [stream_id for stream_id, unsent in self._unsent.items() if len(unsent) == 1]
        for stream_id in whole:
            self._send(DATA, END_STREAM, stream_id, bytes(self._unsent.pop(stream_id)))
        return len(whole)

    def send_more(self, most: int) -> int:
        """Send some of all requests, as far as the server lets them, and return how many bytes, at most `most`."""
        left, goes_on = most, True
        while goes_on:
            goes_on = False
            for stream_id, unsent in self._unsent.items():
                size = min(len(unsent) - 1, self._windows[stream_id], self._window, left, _LARGEST_FRAME)
                if size > 0:
                    self._unsent[stream_id] = unsent[size:]
                    self._send_data(stream_id, bytes(unsent[:size]))
                    left -= size
                    goes_on = True
        return most - left

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end of all calls."""
        self._unsent.clear()
        super().connection_lost(error)

    def _say_hello(self) -> None:
        window = b"" if self._takes_answers else struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)
        self._send(SETTINGS, 0, 0, window)

    def _send_data(self, stream_id: int, data: bytes) -> None:
        self._windows[stream_id] -= len(data)
        self._window -= len(data)
        self._send(DATA, 0, stream_id, data)

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytearray) -> None:
        if kind == SETTINGS and not flags & ACK:
            for setting, value in struct.iter_unpack(">HI", payload):
                if setting == _INITIAL_WINDOW_SIZE:
                    for each in self._windows:
                        self._windows[each] += value - self._initial_window
                    self._initial_window = value
        elif kind == WINDOW_UPDATE:
            (size,) = struct.unpack(">I", payload)
            if stream_id:
                self._windows[stream_id] += size
            else:
                self._window += size
        elif kind in (RST_STREAM, HEADERS) and (kind == RST_STREAM or flags & END_STREAM):
            self._unsent.pop(stream_id, None)
        super()._take(kind, flags, stream_id, payload)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def message_of(message: bytes) -> bytes:
    """Return a message as gRPC frames it: not compressed, with its length."""
    return head_of(message) + message


def head_of(message: bytes) -> bytes:
    """Return what stands before a message."""
    return b"\0" + struct.pack(">I", len(message))


def _field(name: str, value: str) -> bytes:
    """Return a header as a literal that is not indexed (RFC 7541, section 6.2.2)."""
    return b"".join((b"\0", *(struct.pack("B", len(text)) + text.encode() for text in (name, value))))
