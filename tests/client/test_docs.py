"""The examples in docs/client.md do what they show."""

import asyncio
import itertools
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from collab_service import client as names
from collab_service.client import CollabClient, Event, NewEvent, errors
from tests.processes import ServeProcess, clean_environment

DOCS = Path(__file__).parents[2] / "docs" / "client.md"
TEXT = DOCS.read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = [example for example in EXAMPLES if "asyncio.run(" in example]
BODIES = [example for example in EXAMPLES if example not in PROGRAMS]
ENOUGH = 10
"""Events after which an example that would go on for ever is ended."""


class Enough(Exception):
    """An example has shown what it shows."""


@asynccontextmanager
async def others(client: CollabClient, session_id: int) -> AsyncIterator[None]:
    """Append to a session all the time, for the length of the block."""

    async def append() -> None:
        for number in itertools.count():
            await client.append(session_id, NewEvent.of({"line": number}, actor_id="bob", type="edit"))

    task = asyncio.create_task(append(), name="others")
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_nothing_is_missed() -> None:
    """Every block of Python is one that the tests run."""
    assert TEXT.count("```") == 2 * len(EXAMPLES)
    assert (len(PROGRAMS), len(BODIES)) == (1, len(EXAMPLES) - 1)
    assert len(BODIES) > 12


@pytest.mark.parametrize("program", PROGRAMS)
async def test_programs(program: str, server: ServeProcess) -> None:
    """The program prints the event that it has appended, and goes on following."""
    assert program.count("127.0.0.1:50051") == 1
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-u",
        "-c",
        program.replace("127.0.0.1:50051", server.grpc_address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode()
    running = process.returncode is None
    if running:
        process.terminate()
    _, said = await process.communicate()
    assert re.fullmatch(r"\d+ ada \{'text': 'hello'\}\n", line), said.decode()
    assert running


@pytest.mark.parametrize("body", BODIES, ids=[body.partition("\n")[0] for body in BODIES])
async def test_examples(body: str, server: ServeProcess, client: CollabClient) -> None:
    """It runs, with what the page says is there; where it follows, others append meanwhile."""
    session, _ = await client.create_session()
    await client.append_batch(session.id, [NewEvent.of({"text": "hello"}, actor_id="ada", type="edit")] * 3)
    handled: list[Event] = []
    saved: list[int] = []

    async def handle(event: Event) -> None:
        handled.append(event)
        if len(handled) == ENOUGH:
            raise Enough

    namespace: dict[str, Any] = {name: getattr(names, name) for name in names.__all__}
    namespace |= {"asyncio": asyncio, "client": client, "session": session, "target": server.grpc_address}
    namespace |= {"handle": handle, "load": lambda: 0, "save": saved.append}
    exec(compile(f"async def example():\n{indent(body, '    ')}", str(DOCS), "exec"), namespace)
    example: Callable[[], Any] = namespace["example"]
    async with asyncio.timeout(30):
        if "handle(" in body:
            async with others(client, session.id):
                with pytest.raises(Enough):
                    await example()
            numbers = [event.server_seq for event in handled]
            assert numbers == list(range(numbers[0], numbers[0] + ENOUGH))
            assert saved == sorted(saved)
        else:
            await example()


def test_every_error_is_in_the_table() -> None:
    """The table of errors names each class, once."""
    listed = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert sorted(listed) == sorted(kinds - {"ServiceError"})
