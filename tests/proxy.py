"""A proxy between the service and PostgreSQL that loses connections at a chosen moment, or all that is said."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

COMMITTED = b"n\0\0\0\x04C\0\0\0\x0bCOMMIT\0"
"""The server's message that an append's COMMIT was carried out: others' are no prepared statements and have no `n`."""
INSERTING = b"\0insert\0"
"""Part of the client's message that binds the insert of events."""
INSERTING_BEHIND_HEADS = b"\0insert_behind_heads\0"
"""The same for the one statement that is a whole transaction."""
LOCKING = b"\0lock_free\0"
"""Part of the client's message that begins any other transaction of an append."""
INSERTED = b"C\0\0\0\x0dSELECT 1\0Z"
"""The server's message that this statement was committed."""


class PostgresProxy:
    """Passes bytes on until it is told to cut."""

    def __init__(self, url: str) -> None:
        self._target = conninfo_to_dict(url)
        self._directory = Path(tempfile.mkdtemp(prefix="collab-proxy-"))
        self.url = make_conninfo(url, host=str(self._directory))
        self._client_word: bytes | None = None
        self._late = False
        self._delayed: tuple[bytes, asyncio.StreamWriter] | None = None
        self._late_answer = asyncio.Event()
        self._actions: dict[bytes, Callable[[], Awaitable[None]]] = {}
        self._server_word: bytes | None = None
        self._refusing = False
        self._silent = False
        self._deaf: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0

    def cut_before_client_says(self, word: bytes, *, late: bool = False) -> None:
        """Lose the next connection when the client sends `word`, which does not get through.

        Args:
            word: The bytes.
            late: It gets through when `send_what_is_late` is called; the server does not notice the cut before.
        """
        self._client_word = word
        self._late = late

    def send_what_is_late(self) -> None:
        """Let the server have what was held back."""
        assert self._delayed is not None
        data, sink = self._delayed
        sink.write(data)

    async def send_what_is_late_and_wait(self) -> None:
        """Let the server have what was held back, and wait until it has answered."""
        self._late_answer.clear()
        self.send_what_is_late()
        await self._late_answer.wait()

    def before_anybody_says(self, word: bytes, action: Callable[[], Awaitable[None]]) -> None:
        """Do something once when the client or the server says `word`, before that gets through."""
        self._actions[word] = action

    def cut_before_server_says(self, word: bytes, *, stay_away: bool = False) -> None:
        """Lose the next connection when the server sends `word`, which does not get through.

        Args:
            word: The bytes.
            stay_away: Refuse connections from then on, until `come_back`.
        """
        self._server_word = word
        self._stay_away = stay_away

    def fall_silent(self) -> None:
        """Swallow what is said on all connections, new ones as well, until `come_back`; the old ones never recover."""
        self._silent = True
        self._deaf |= self._connections

    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return bool(self._connections)

    def come_back(self) -> None:
        """Accept connections again."""
        self._refusing = self._silent = False

    async def __aenter__(self) -> Self:
        name = f".s.PGSQL.{self._target.get('port') or 5432}"
        self._server = await asyncio.start_unix_server(self._accept, self._directory / name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._connections:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._directory)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.close()
            return
        if self._silent:
            self._deaf.add(writer)
            self._connections.add(writer)
            await reader.read()
            writer.close()
            return
        path = f"{self._target['host']}/.s.PGSQL.{self._target.get('port') or 5432}"
        server_reader, server_writer = await asyncio.open_unix_connection(path)
        pair = (writer, server_writer)
        self._connections.update(pair)
        for source, sink, from_server in ((reader, server_writer, False), (server_reader, writer, True)):
            task = asyncio.create_task(self._pump(source, sink, pair, from_server), name="proxy-pump")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, ...],
        from_server: bool,
    ) -> None:
        try:
            while data := await source.read(65536):
                if sink in self._deaf:
                    continue
                if from_server and self._server_word is not None and self._server_word in data:
                    self._server_word = None
                    self._refusing = self._stay_away
                    self.cuts += 1
                    return
                if not from_server and self._client_word is not None and self._client_word in data:
                    self._client_word = None
                    self.cuts += 1
                    if self._late:
                        self._delayed = data, sink
                        pair = pair[:1]  # the one that is closed
                    return
                if from_server and self._delayed is not None and self._delayed[1] is pair[1]:
                    self._late_answer.set()
                for word in [word for word in self._actions if word in data]:
                    await self._actions.pop(word)()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            for writer in pair:
                writer.close()
            self._connections.difference_update(pair)
