"""Servers on databases of their own, so that a measurement begins with nothing."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import grpc
import psycopg
from msgspec import Struct

from collab_service.storage import schema
from collab_service.storage.embedded import Cluster
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.conftest import database_url_of
from tests.processes import ServeProcess

BATCH = 1_000
"""Events of an append when a session is filled."""


class Server(Struct, frozen=True):
    """A server on a database of its own."""

    address: str
    pid: int
    database_url: str

    def new_sessions(self, count: int) -> list[int]:
        """Create sessions and return their ids."""
        with grpc.insecure_channel(self.address) as channel, ThreadPoolExecutor(16) as pool:
            create = CollabServiceStub(channel).CreateSession
            return [answer.session.id for answer in pool.map(create, repeat(pb.CreateSessionRequest(), count))]

    def head(self, session: int) -> int:
        """Return the number of a session's last event."""
        request = pb.GetSessionRequest(session_id=session)
        with grpc.insecure_channel(self.address) as channel:
            return CollabServiceStub(channel).GetSession(request).session.last_server_seq

    def fill(self, session: int, size: int) -> None:
        """Append batches to a session until it has at least so many events."""
        event = pb.NewEvent(actor_id="ada", client_seq=7, type="edit", binary=random.Random(1).randbytes(200))
        batch = pb.AppendEventsRequest(session_id=session, events=[event] * BATCH)
        batches = -(-(size - self.head(session)) // BATCH)
        with grpc.insecure_channel(self.address) as channel, ThreadPoolExecutor(2) as pool:
            for _ in pool.map(CollabServiceStub(channel).AppendEvents, repeat(batch, batches)):
                pass

    def settle(self) -> None:
        """Have PostgreSQL do now what it would do by itself in a while, in the middle of a measurement."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE) collab_events")
            connection.execute("CHECKPOINT")

    def database_gigabytes(self) -> float:
        """Return what the database takes of the disk, without the write-ahead log."""
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
            assert row is not None
            return int(row[0]) / 1e9


@contextmanager
def serving(cluster: Cluster, directory: Path, name: str) -> Iterator[Server]:
    """Run a server on a new database, which is dropped in the end.

    Args:
        cluster: Where the database is made.
        directory: Where the server runs.
        name: Of the database.
    """
    database_url = database_url_of(cluster, name)
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        schema.migrate(database_url)
        with ServeProcess("--database-url", database_url, cwd=directory) as server:
            yield Server(server.grpc_address, server.process.pid, database_url)
        connection.execute(f"DROP DATABASE {name}")
