"""`collab replay`: a recorded editing session, written into the service, read back and checked."""

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from collab_service.cli.failure import CommandError
from collab_service.cli.settings import Target
from collab_service.cli.trace import Trace, Transaction, apply_patches, read_trace
from collab_service.model import NewEvent
from collab_service.model.chain import chain_next, chain_start, content_digest
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

_TIMEOUT = 60.0
"""Seconds for one call; reading back has no bound, since it is as long as the recording."""
_BATCH_BYTES = 2 * 1024 * 1024


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A recording: gzipped JSON with txns and endContent.")],
    target: Target = "127.0.0.1:50051",
    batch: Annotated[
        int, typer.Option(min=1, max=1000, help="Transactions in an append; 1 appends each on its own.")
    ] = 100,
) -> None:
    """Write a recorded editing session into a new session, read it back, and check it.

    Each transaction becomes an event of the person who wrote it, with their own client_seq. What is read back must
    amount to the recorded text, and its chain, computed anew here, must be the one that the service keeps.

    Example: `collab replay shared/traces/rustcode.json.gz`
    """
    console = Console(highlight=False)
    recording = read_trace(trace)
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target, options) as channel:
        stub = CollabServiceStub(channel)
        session = stub.CreateSession(pb.CreateSessionRequest(owner_id="replay"), timeout=_TIMEOUT).session
        count = len(recording.transactions)
        console.print(f"Session {session.id}: {count:,} transactions from {trace.name}")
        with _progress(console) as progress:
            started = time.perf_counter()
            _append(stub, session.id, recording, batch, progress)
            appended = time.perf_counter()
            text, chain_hash = _read_back(stub, session.id, recording, progress)
            read = time.perf_counter()
        kept = stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=_TIMEOUT).session
    _tell(console, f"appended   {_rate(count, appended - started)}, {batch} to an append, every one durable")
    _tell(console, f"read back  {_rate(count, read - appended)}")
    if text != recording.end:
        raise CommandError(f"the text read back from session {session.id} is not the recorded one")
    _tell(console, f"text       {len(text):,} code points, as recorded")
    if (kept.last_server_seq, kept.chain_hash) != (count, chain_hash):
        raise CommandError(f"session {session.id} ends elsewhere than its events do")
    _tell(console, f"chain      {chain_hash.hex()}, computed anew from {count:,} events, as the service has it")


def _append(stub: CollabServiceStub, session_id: int, recording: Trace, batch: int, progress: Progress) -> None:
    task = progress.add_task("append", total=len(recording.transactions))
    last = 0
    for events in _batches(_new_events(recording.transactions), batch):
        request = pb.AppendEventsRequest(session_id=session_id, events=events, expected_last_server_seq=last)
        response = stub.AppendEvents(request, timeout=_TIMEOUT)
        last = response.last_server_seq
        progress.update(task, advance=len(events))


def _new_events(transactions: Sequence[Transaction]) -> Iterator[pb.NewEvent]:
    run = uuid.uuid4().hex
    counters: dict[int, Iterator[int]] = {}
    for index, transaction in enumerate(transactions):
        yield pb.NewEvent(
            actor_id=f"agent-{transaction.agent}",
            client_seq=next(counters.setdefault(transaction.agent, itertools.count())),
            type="edit",
            json=json.dumps({"time": transaction.time, "patches": transaction.patches}, ensure_ascii=False),
            idempotency_key=f"{run}-{index}",
        )


def _batches(events: Iterator[pb.NewEvent], count: int) -> Iterator[list[pb.NewEvent]]:
    batch: list[pb.NewEvent] = []
    size = 0
    for event in events:
        if batch and (len(batch) == count or size + event.ByteSize() > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += event.ByteSize()
    if batch:
        yield batch


def _read_back(stub: CollabServiceStub, session_id: int, recording: Trace, progress: Progress) -> tuple[str, bytes]:
    """Return the text that the session's events amount to, and their chain's head, computed here."""
    task = progress.add_task("read back", total=len(recording.transactions))
    text = recording.start
    chain_hash = chain_start(session_id)
    for message in stub.ListEvents(pb.ListEventsRequest(session_id=session_id)):
        for event in message.events:
            chain_hash = chain_next(
                chain_hash,
                session_id,
                event.server_seq,
                event.create_time.ToMicroseconds(),
                content_digest(_content(event)),
            )
            if chain_hash != event.chain_hash:
                raise CommandError(f"the chain of session {session_id} breaks at event {event.server_seq}")
            text = apply_patches(text, json.loads(event.json)["patches"])
        progress.update(task, advance=len(message.events))
    return text, chain_hash


def _content(event: pb.Event) -> NewEvent:
    return NewEvent(
        event.actor_id if event.HasField("actor_id") else None,
        event.client_seq if event.HasField("client_seq") else None,
        event.type if event.HasField("type") else None,
        event.json if event.WhichOneof("payload") == "json" else event.binary,
        event.hash if event.HasField("hash") else None,
        event.signature,
        event.idempotency_key if event.HasField("idempotency_key") else None,
    )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _rate(count: int, seconds: float) -> str:
    return f"{count:,} events in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def _tell(console: Console, line: str) -> None:
    console.print("  " + line, soft_wrap=True)
