"""`collab replay`: a recorded editing session, written into the service, read back and checked."""

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer

from collab_service.cli.batches import batches
from collab_service.cli.connection import Target, connected
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.loop import run
from collab_service.cli.output import progress, rate, say
from collab_service.cli.trace import Trace, Transaction, apply_patches, read_trace
from collab_service.client import DEFAULT_TARGET, CollabClient, LogCheck, NewEvent


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A recording: gzipped JSON with txns and endContent.")],
    target: Target = DEFAULT_TARGET,
    batch: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Transactions in an append; 1 appends each on its own.")
    ] = 100,
) -> None:
    """Write a recorded editing session into a new session, read it back, and check it.

    Each transaction becomes an event of the person who wrote it, with their own client_seq. What is read back must
    amount to the recorded text, and its chain, computed anew here, must be the one that the service keeps.

    Example: `collab replay shared/traces/rustcode.json.gz`
    """
    recording = read_trace(trace)
    count = len(recording.transactions)

    async def work() -> None:
        async with connected(target) as client:
            session_id = (await client.create_session(owner_id="replay")).session.id
            say(f"Session {session_id}: {count:,} transactions from {trace.name}")
            started = time.perf_counter()
            await _append(client, session_id, recording, batch)
            appended = time.perf_counter()
            text, check = await _read_back(client, session_id, recording)
            read = time.perf_counter()
            kept = await client.get_session(session_id)
        say(f"  appended   {rate(count, appended - started)}, {batch} to an append, every one durable")
        say(f"  read back  {rate(count, read - appended)}")
        if text != recording.end:
            raise CommandError(
                f"the text read back from session {session_id} is not the recorded one", ExitStatus.CHECK_FAILED
            )
        say(f"  text       {len(text):,} code points, as recorded")
        if (kept.last_server_seq, kept.chain_hash) != (count, check.chain_hash):
            raise CommandError(f"session {session_id} ends elsewhere than its events do", ExitStatus.CHECK_FAILED)
        say(f"  chain      {check.chain_hash.hex()}, computed anew from {count:,} events, as the service has it")

    run(work())


async def _append(client: CollabClient, session_id: int, recording: Trace, batch: int) -> None:
    with progress() as bar:
        task = bar.add_task("append", total=len(recording.transactions))
        last = 0
        for events in batches(_new_events(recording.transactions), batch):
            last = (await client.append_batch(session_id, events, expected_last_server_seq=last)).last_server_seq
            bar.update(task, completed=last)


def _new_events(transactions: Sequence[Transaction]) -> Iterator[NewEvent]:
    replay_id = uuid.uuid4().hex
    counters: dict[int, Iterator[int]] = {}
    for index, transaction in enumerate(transactions):
        yield NewEvent(
            json.dumps({"time": transaction.time, "patches": transaction.patches}, ensure_ascii=False),
            actor_id=f"agent-{transaction.agent}",
            client_seq=next(counters.setdefault(transaction.agent, itertools.count())),
            type="edit",
            idempotency_key=f"{replay_id}-{index}",
        )


async def _read_back(client: CollabClient, session_id: int, recording: Trace) -> tuple[str, LogCheck]:
    """Return the text that the session's events amount to, and their chain, computed here."""
    text = recording.start
    check = LogCheck(session_id)
    with progress() as bar:
        task = bar.add_task("read back", total=len(recording.transactions))
        async with aclosing(client.read_pages(session_id)) as pages:
            async for page in pages:
                for event in page.events:
                    check.add(event)
                    text = apply_patches(text, event.value()["patches"])
                bar.update(task, completed=check.last_server_seq)
    return text, check
