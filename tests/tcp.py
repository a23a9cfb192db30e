"""A proxy between clients and the service that loses connections, or answers, at a chosen moment."""

import asyncio
import ssl
from typing import Self

from tests.http2 import PREFACE

_FRAME_HEAD = 9
_DATA, _HEADERS = 0, 1

_Pair = tuple[asyncio.StreamWriter, asyncio.StreamWriter]
"""Of one connection: to the client, to the server."""


class TcpProxy:
    """Passes gRPC connections on, HTTP/2 frame by frame, until it is told to cut or to hold back."""

    def __init__(self, server_address: str, tls: ssl.SSLContext | None = None) -> None:
        """Prepare; entering the context opens the port.

        Args:
            server_address: Where the service listens, in the clear.
            tls: With what to take TLS off clients' connections, if they have it.
        """
        self.server_address = server_address
        self._tls = tls
        self.calls = 0
        """Calls that clients have sent, each attempt counted."""
        self.cuts = 0
        """Connections that were cut as `lose_answer` and `cut_after` asked for."""
        self.accepted = 0
        """Connections that were accepted."""
        self.refused = 0
        """Connections that were not accepted."""
        self._connections: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self._passing = asyncio.Event()
        self._passing.set()
        self._loses_answer = False
        self._bytes_left: int | None = None
        self._seconds_per_byte = 0.0

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return bool(self._connections)

    def cut(self) -> None:
        """Lose all connections now."""
        for pair in self._connections:
            for writer in pair:
                writer.transport.abort()

    def refuse(self) -> None:
        """Accept no connection, until `accept`."""
        self._refusing = True

    def accept(self) -> None:
        """Accept connections again."""
        self._refusing = False

    def hold(self) -> None:
        """Keep back what the server says, until `release`."""
        self._passing.clear()

    def release(self) -> None:
        """Pass on what was held back, and all that follows."""
        self._passing.set()

    def throttle(self, bytes_per_second: float) -> None:
        """Pass on so much and no more in each direction of a connection; `math.inf` is as fast as it can."""
        self._seconds_per_byte = 1 / bytes_per_second

    def lose_answer(self) -> None:
        """Lose the next connection on which the server answers a call, which is carried out and never answered."""
        self._loses_answer = True

    def cut_after(self, count: int) -> None:
        """Lose the connection on which the server says the last of so many bytes, be it in the middle of a message."""
        self._bytes_left = count

    @property
    def will_cut(self) -> bool:
        """Whether a cut that was asked for is still to come."""
        return self._loses_answer or self._bytes_left is not None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="tcp-proxy")
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            writer.close()  # however the task has ended, and if it never began

        task.add_done_callback(done)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self._refusing:
            self.refused += 1
            return
        self.accepted += 1
        host, _, port = self.server_address.rpartition(":")
        try:
            server, to_server = await asyncio.open_connection(host, int(port))
        except OSError:
            to_client.transport.abort()
            return
        pair = (to_client, to_server)
        self._connections.add(pair)
        pumps = [
            asyncio.create_task(self._pass_requests(client, to_server), name="tcp-proxy-requests"),
            asyncio.create_task(self._pass_answers(server, to_client), name="tcp-proxy-answers"),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_server.close()  # before anything is waited for, since the end of the proxy may come meanwhile
            self._connections.discard(pair)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pass_requests(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        to_server.write(await client.readexactly(len(PREFACE)))
        while True:
            kind, frame = await _frame(client)
            self.calls += kind == _HEADERS
            to_server.write(frame)
            await to_server.drain()
            await self._take_time(frame)

    async def _pass_answers(self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while True:
            kind, frame = await _frame(server)
            await self._passing.wait()
            if self._loses_answer and kind in (_DATA, _HEADERS):
                self._loses_answer = False
                self.cuts += 1
                return
            if self._bytes_left is not None and len(frame) >= self._bytes_left:
                to_client.write(frame[: self._bytes_left])
                self._bytes_left = None
                self.cuts += 1
                return
            if self._bytes_left is not None:
                self._bytes_left -= len(frame)
            to_client.write(frame)
            await to_client.drain()
            await self._take_time(frame)

    async def _take_time(self, frame: bytes) -> None:
        if self._seconds_per_byte:
            await asyncio.sleep(len(frame) * self._seconds_per_byte)


async def _frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return the next frame's type, and all of it (RFC 9113, section 4.1)."""
    head = await reader.readexactly(_FRAME_HEAD)
    return head[3], head + await reader.readexactly(int.from_bytes(head[:3], "big"))
