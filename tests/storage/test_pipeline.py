"""Connections on which appends are written: one that is lost is noticed at once, however it is lost."""

import asyncio
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from collab_service.cli.loop import new_event_loop
from collab_service.storage.database import Database
from collab_service.storage.pipeline import Command, PipelineConnection, Statement
from tests.log.logs import unseen

_SECONDS = 5.0
"""In which a loss is noticed; it takes no time."""
_SLEEP = Command(Statement(b"sleep", b"SELECT pg_sleep(60)"))
_NOTHING = Command(Statement(b"nothing", b"SELECT"))


class ResettingProxy:
    """Passes one TCP connection to PostgreSQL on, keeps back the server's last words, and resets the connection."""

    def __init__(self, url: str) -> None:
        self._target = conninfo_to_dict(url)
        self._url = url
        self._loop = asyncio.get_running_loop()
        self._keeping_back = False
        self.has_reset = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self._listener.getsockname()
        return make_conninfo(self._url, host=host, port=port)

    def keep_back_last_words(self) -> None:
        """From now on, keep what the server says, and pass it on just before the reset."""
        self._keeping_back = True

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.setblocking(False)
        self._task = asyncio.create_task(self._serve(), name="resetting-proxy")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._server.close()
        self._listener.close()

    async def _serve(self) -> None:
        client, _ = await self._loop.sock_accept(self._listener)
        client.setblocking(False)
        path = f"{self._target['host']}/.s.PGSQL.{self._target.get('port') or 5432}"
        await self._loop.sock_connect(self._server, path)
        requests = asyncio.create_task(self._pass_requests(client), name="resetting-proxy-requests")
        kept = b""
        with suppress(ConnectionError):  # the server has ended before it has read everything
            while data := await self._loop.sock_recv(self._server, 65_536):
                if self._keeping_back:
                    kept += data
                else:
                    await self._loop.sock_sendall(client, data)
        requests.cancel()
        await asyncio.gather(requests, return_exceptions=True)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.send(kept)  # and the reset is there before anybody on this loop can look
        client.close()
        self.has_reset.set()

    async def _pass_requests(self, client: socket.socket) -> None:
        with suppress(ConnectionError):
            while data := await self._loop.sock_recv(client, 65_536):
                await self._loop.sock_sendall(self._server, data)


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "waiting"])
@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def test_a_reset_is_noticed_behind_last_words(database_url: str, make_loop: Any, idle: bool) -> None:
    """Whoever waits for a server that says why it ends, and is gone, is told at once, and so is who comes next."""

    async def lose() -> None:
        async with ResettingProxy(database_url) as proxy, asyncio.timeout(_SECONDS):
            database = Database(proxy.url, metrics=unseen().database.pool("appends"))
            async with await PipelineConnection.open(database) as connection:
                await connection.run(_NOTHING)
                proxy.keep_back_last_words()
                waiting: Coroutine[Any, Any, Any] = proxy.has_reset.wait() if idle else connection.run(_SLEEP)
                task = asyncio.create_task(waiting)
                async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
                    await other.execute("SELECT pg_terminate_backend(%s)", [connection.backend_pid])
                if idle:
                    await task
                else:
                    with pytest.raises(psycopg.OperationalError):
                        await task
                with pytest.raises(psycopg.OperationalError):
                    await connection.run(_NOTHING)
                assert not connection.usable

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(lose())
