"""A run of `collab bench`: sessions, the load on them, the figures, and what is wrong with them."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from collab_service.cli.bench_report import Outcome, Progress, in_words, print_outcome
from collab_service.cli.connection import connected
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.figures import Figures
from collab_service.cli.loads import Loads, Order
from collab_service.cli.loop import run
from collab_service.cli.output import Output, events_in_words
from collab_service.client import CollabClient, ServiceError, SessionNotFound

_OWNER = "collab bench"
"""Of the sessions."""
_AT_ONCE = 32
"""Calls that are under way at the same time when there are many sessions."""
_TICK = 1.0
"""Seconds between looks at how it goes."""
_TIMEOUT = 5.0
"""Seconds for what is asked of the service before and after the load."""


def measure(order: Order, sessions: int, *, keep: bool, output: Output) -> None:
    """Put a load on new sessions, and print what comes of it.

    Ctrl-C and SIGTERM end it early, with the figures until then.

    Args:
        order: The load; its sessions are created here.
        sessions: How many.
        keep: Leave the sessions.
        output: For whom to print.

    Raises:
        CommandError: Something went wrong; also after the figures were printed.
    """

    async def work() -> Outcome:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with connected(order.target) as client:
            measuring = asyncio.create_task(_measure(client, order, sessions, keep, output, stop), name="bench")
            try:
                return await asyncio.shield(measuring)
            except asyncio.CancelledError:  # Ctrl-C; a second one ends it at once
                stop.set()
                return await measuring

    outcome = run(work())
    print_outcome(outcome, output)
    if problems := list(_problems(outcome, keep)):
        raise CommandError("; ".join(sentence for sentence, _ in problems), problems[0][1])


async def _measure(
    client: CollabClient, order: Order, sessions: int, keep: bool, output: Output, stop: asyncio.Event
) -> Outcome:
    """Create the sessions, put the load on them, and delete them, unless they are to be kept."""
    ids: list[int] = []

    async def create(_: int) -> None:
        if not stop.is_set():
            ids.append((await client.create_session(owner_id=_OWNER, timeout=_TIMEOUT)).session.id)

    try:
        await _each(create, range(sessions))
        order = replace(order, sessions=sorted(ids))
        figures, stored = await _put(order, client, output, stop)
    finally:
        if not keep:
            ids = await _delete(client, ids)
    return Outcome(order, figures, stored, sorted(ids), stop.is_set())


async def _put(order: Order, client: CollabClient, output: Output, stop: asyncio.Event) -> tuple[Figures, int | None]:
    """Put the load on the service; return what was seen, and how many events the service has stored, if it says so."""
    async with Loads(order) as loads:
        if stop.is_set():
            raise CommandError("interrupted; nothing was measured", ExitStatus.INTERRUPTED)
        with Progress(order, output) as progress:
            writing = asyncio.create_task(loads.write(), name="write")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            while not writing.done():
                await asyncio.wait((writing, stopping), timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
                progress.show(loads.figures)
                if stop.is_set():
                    loads.stop()
                    await asyncio.wait((writing,))
            stopping.cancel()
            await writing
        heads: dict[int, int] = {}
        stored: int | None = None

        async def look(session_id: int) -> None:
            heads[session_id] = (await client.get_session(session_id, timeout=_TIMEOUT)).last_server_seq

        with suppress(ServiceError):
            await _each(look, order.sessions)
            stored = sum(heads.values())
        await loads.finish(heads)
        return loads.figures, stored


async def _delete(client: CollabClient, ids: Sequence[int]) -> list[int]:
    """Delete sessions, and return those that cannot be deleted."""
    left = set(ids)

    async def delete(session_id: int) -> None:
        with suppress(SessionNotFound):
            await client.delete_session(session_id, timeout=_TIMEOUT)
        left.discard(session_id)

    with suppress(ServiceError):
        await _each(delete, ids)
    return list(left)


async def _each(call: Callable[[int], Awaitable[None]], items: Iterable[int]) -> None:
    """Make a call with each item, some of them side by side; raise an error when no call is under way any more."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await call(item)

    for result in await asyncio.gather(*(work() for _ in range(_AT_ONCE)), return_exceptions=True):
        if result is not None:
            raise result


def _problems(outcome: Outcome, keep: bool) -> Iterator[tuple[str, ExitStatus]]:
    """Yield what went wrong and the exit status for it, the worst first."""
    figures = outcome.figures
    acknowledged = figures.events + figures.warm_up_events
    if outcome.stored is not None and not 0 <= outcome.stored - acknowledged <= figures.doubtful_events:
        yield (
            f"{acknowledged:,} events were acknowledged, and {outcome.stored:,} are stored",
            ExitStatus.CHECK_FAILED,
        )
    if figures.misplaced:
        yield (
            f"{events_in_words(figures.misplaced)} came twice, out of order or behind a gap",
            ExitStatus.CHECK_FAILED,
        )
    if figures.missing:
        yield (f"{events_in_words(figures.missing)} did not come to a follower", ExitStatus.CHECK_FAILED)
    for reason, failures in figures.failures.items():
        yield (f"{in_words(failures.count, 'call')} failed with {reason} ({failures.example})", failures.status)
    if outcome.stored is None:
        yield ("the service does not say how many events are stored", ExitStatus.UNAVAILABLE)
    if outcome.kept and not keep:
        yield (
            f"{in_words(len(outcome.kept), 'session')} could not be deleted; find them with: "
            f"collab session list --owner '{_OWNER}'",
            ExitStatus.UNAVAILABLE,
        )
    if outcome.is_interrupted:
        yield ("interrupted", ExitStatus.INTERRUPTED)
