"""Backup and restore, by the very commands of docs/operating.md."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg
import pytest

from collab_service.client import CollabClient, NewEvent, ServerSeqBeyondHead
from collab_service.storage.database import libpq_url
from collab_service.storage.embedded import Cluster
from tests.conftest import database_url_of
from tests.gateway.calls import refused
from tests.processes import ServeProcess, clean_environment, collab

_PAGE = Path(__file__).parent.parent.parent / "docs" / "operating.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)

Run = Callable[[str], None]


def commands(heading: str) -> list[str]:
    """Return the commands that the page has below a heading."""
    page = _PAGE.read_text()
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    assert section, heading
    blocks = _BLOCK.findall(section[1])
    assert blocks
    return blocks


def runner(cluster: Cluster, directory: Path, **environment: str) -> Run:
    """Return a function that runs commands in a directory, with `collab` and PostgreSQL's programs on the path."""
    path = os.pathsep.join((str(cluster.bin), str(Path(sys.executable).parent), os.environ["PATH"]))

    def run(script: str) -> None:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory, capture_output=True, text=True, timeout=60, check=False,
            env=clean_environment(**environment, PATH=path),
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr

    return run


async def fill(address: str) -> list[int]:
    """Write two sessions with events of both kinds and return their ids."""
    async with CollabClient(address) as client:
        ids = []
        for _ in range(2):
            session, _ = await client.create_session()
            events = [NewEvent.of({"text": "héllo 😀"}, actor_id="ada", idempotency_key="k"), NewEvent(b"\x00\xff")]
            await client.append_batch(session.id, events)
            ids.append(session.id)
        return ids


async def read(address: str, ids: list[int]) -> list[object]:
    """Return all that sessions hold."""
    async with CollabClient(address) as client:
        return [event for of in ids for event in [event async for event in client.read(of)]]


async def goes_on(server: ServeProcess, ids: list[int], kept: list[object], lost: int) -> None:
    """Check a restored service: everything is there, it verifies, numbers go on, and who has seen more is told.

    Args:
        server: The service.
        ids: The sessions.
        kept: What they held at the backup.
        lost: The number of an event of the first session that came later.
    """
    assert await read(server.grpc_address, ids) == kept
    for session_id in ids:
        verified = collab("verify", str(session_id), "--target", server.grpc_address)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    async with CollabClient(server.grpc_address) as client:
        with pytest.raises(ServerSeqBeyondHead):
            await anext(client.follow(ids[0], since=lost))
        with pytest.raises(ServerSeqBeyondHead):
            await anext(client.read(ids[0], since=lost))
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", trust_env=False) as http:
            answer = await http.get("/api/collab/events", params={"sessionId": ids[0], "sinceServerSeq": lost})
        refused(answer, 400, "SERVER_SEQ_BEYOND_HEAD")
        # A key that was stored before the backup is still known, and a new event gets the next number.
        again = await client.append(ids[1], NewEvent.of({"text": "héllo 😀"}, actor_id="ada", idempotency_key="k"))
        assert (again.replayed, again.event.server_seq) == (True, 1)
        assert (await client.append(ids[1], NewEvent.of({}))).event.server_seq == 3
        session, _ = await client.create_session()
        assert session.id > max(ids)


async def append_more(address: str, session_id: int) -> int:
    """Append an event that no backup has, and return its number."""
    async with CollabClient(address) as client:
        return (await client.append(session_id, NewEvent.of({"later": True}))).event.server_seq


async def test_a_dump(cluster: Cluster, database_url: str, directory: Path) -> None:
    """`pg_dump` while the service runs, `pg_restore` into a new database: the service goes on there."""
    restored = database_url_of(cluster, "collab_restored")
    run = runner(cluster, directory, COLLAB_DATABASE_URL=libpq_url(database_url), RESTORED_URL=restored)
    dump, restore = commands("A database of your own")
    with ServeProcess("--database-url", database_url, cwd=directory) as server:
        ids = await fill(server.grpc_address)
        kept = await read(server.grpc_address, ids)
        run(dump)
        lost = await append_more(server.grpc_address, ids[0])
    run(restore)
    with ServeProcess("--database-url", restored, cwd=directory) as server:
        await goes_on(server, ids, kept, lost)
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("DROP DATABASE collab_restored")


@pytest.mark.long
@pytest.mark.parametrize("heading", ["The database of `collab serve`: a base backup", "The same: a dump"])
async def test_the_embedded_database(cluster: Cluster, directory: Path, heading: str) -> None:
    """Backed up while the service runs, and restored into a new data directory."""
    data, new = directory / "data", directory / "new"
    run = runner(cluster, directory, DATA=str(data), NEW=str(new))
    backup, restore = commands(heading)
    with ServeProcess("--data-dir", str(data), cwd=directory) as server:
        ids = await fill(server.grpc_address)
        kept = await read(server.grpc_address, ids)
        run(backup)
        lost = await append_more(server.grpc_address, ids[0])
    shutil.rmtree(data / "postgres")
    if heading.endswith("dump"):
        with ServeProcess("--data-dir", str(new), cwd=directory):
            run(restore)
    else:
        run(restore)
    with ServeProcess("--data-dir", str(new), cwd=directory) as server:
        await goes_on(server, ids, kept, lost)


def test_the_programs_are_where_the_page_says(cluster: Cluster, directory: Path) -> None:
    """The command that shows where PostgreSQL's programs are shows a directory that has those of the page."""
    (show,) = commands("PostgreSQL's programs")
    runner(cluster, directory)(f'shown="$({show})"; test -x "$shown/pg_dump"; test -x "$shown/pg_basebackup"')
