"""`collab bench`: how much a running service takes, and how long its answers and deliveries take."""

from typing import Annotated

import typer

from collab_service.cli.connection import Target
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.output import Output, OutputOption
from collab_service.client import DEFAULT_TARGET

_DURATION = 10.0
"""Seconds, unless the events are counted."""


def bench(
    writers: Annotated[
        int, typer.Option(min=1, max=10_000, metavar="N", help="Writers; each waits for an answer before it goes on.")
    ] = 64,
    sessions: Annotated[
        int, typer.Option(min=1, max=10_000, metavar="N", help="New sessions over which the writers are spread.")
    ] = 1,
    payload: Annotated[
        int,
        typer.Option(
            min=0, max=2**23, metavar="BYTES", help="The size of each event's payload, a JSON object; 0: no payload."
        ),
    ] = 200,
    batch: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Events in an append.")] = 1,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Append through a stream of each connection; otherwise each append is a call."),
    ] = False,
    followers: Annotated[
        int, typer.Option(min=0, max=10_000, metavar="N", help="Followers in all, spread over the sessions.")
    ] = 0,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=86_400,
            metavar="SECONDS",
            help="How long to measure; 10 unless --events is given.",
            show_default=False,
        ),
    ] = None,
    events: Annotated[
        int | None, typer.Option(min=1, max=10**12, metavar="N", help="End after so many events.", show_default=False)
    ] = None,
    warm_up: Annotated[
        float, typer.Option(min=0, max=3600, metavar="SECONDS", help="Load before anything is measured.")
    ] = 1.0,
    processes: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Processes of load; each keeps up to a core busy.")
    ] = 1,
    connections: Annotated[
        int,
        typer.Option(
            min=1, max=100, metavar="N", help="Connections of each process for writers, and as many for followers."
        ),
    ] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the sessions, which are deleted otherwise.")] = False,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Measure a running service: rate, latency, delivery to followers; and check what it promises.

    The load is a closed loop: each writer appends, waits until that is durable and acknowledged, and goes on. Whether
    every acknowledged event is stored, and comes to each follower once and in order, is checked as well. Ctrl-C ends
    it early, with the figures until then. The exit status is 3 or 1 when calls failed, 6 when a promise was broken.

    Examples:

    * `collab bench`

    * `collab bench --stream --writers 1000 --processes 2`

    * `collab bench --writers 8 --followers 100 --duration 30`

    * `collab bench --batch 100 --events 1000000 --output json`
    """  # fmt: skip
    if payload == 1:
        raise CommandError(
            "--payload 1 is no JSON object, whose smallest has 2 bytes; 0 is no payload", ExitStatus.USAGE
        )
    if processes > writers:
        raise CommandError("each of the --processes needs one of the --writers", ExitStatus.USAGE)
    # Other commands start sooner without these.
    from collab_service.cli.benching import measure
    from collab_service.cli.loads import Order

    order = Order(
        target=target,
        sessions=(),
        writers=writers,
        followers=followers,
        batch=batch,
        payload_bytes=payload,
        stream=stream,
        connections=connections,
        warm_up=warm_up,
        duration=_DURATION if duration is None and events is None else duration,
        events=events,
        processes=processes,
    )
    measure(order, sessions, keep=keep, output=output)
