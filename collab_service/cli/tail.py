"""`collab tail`: a session's events as they come."""

import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

import grpc
import typer

from collab_service.cli.failure import CommandError
from collab_service.cli.settings import Target
from collab_service.model.limits import MAX_INT64
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub

_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""What comes when a server stops, is overloaded or is gone; reading on from the last number is always safe."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts to follow again."""
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    # A server that vanishes without a word is noticed within a quarter of a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


def tail(
    session: Annotated[int, typer.Argument(metavar="SESSION", min=1, max=MAX_INT64, help="The session's number.")],
    since: Annotated[
        int, typer.Option(min=0, max=MAX_INT64, metavar="N", help="Begin after this number; 0 is the beginning.")
    ] = 0,
    target: Target = "127.0.0.1:50051",
) -> None:
    """Show a session's events as they come, until Ctrl-C.

    Each is a line: its number, its time, who did it, its type (`-` where there is none) and its payload. When the
    connection or the server is lost, it goes on after the last number shown as soon as there is one again.

    Example: `collab tail 1 --since 100`
    """
    threading.Thread(target=_interrupt_when_nobody_reads, daemon=True).start()
    try:
        for event in follow(target, session, since):
            sys.stdout.write(f"{line_of(event)}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # as from `collab tail 1 | head`
        sys.stderr.close()
    except OSError as error:
        raise CommandError(f"cannot write to standard output: {error.strerror}") from error


def _interrupt_when_nobody_reads() -> None:
    """Wait until the other end of standard output is closed, as `head` does, and press Ctrl-C."""
    poll = select.poll()
    with suppress(io.UnsupportedOperation):  # standard output is no file
        poll.register(sys.stdout.fileno(), 0)  # errors are always told
        poll.poll()
        os.kill(os.getpid(), signal.SIGINT)


def follow(target: str, session_id: int, since: int) -> Iterator[pb.Event]:
    """Yield the events after `since` and those that come, for ever, each once, whatever is cut in between.

    Raises:
        grpc.RpcError: The first attempt failed, or something that waiting does not help.
    """
    begun, pause = False, _FIRST_PAUSE
    while True:
        with grpc.insecure_channel(target, _OPTIONS) as channel:
            request = pb.ListEventsRequest(session_id=session_id, since_server_seq=since, follow=True)
            try:
                for message in CollabServiceStub(channel).ListEvents(request):
                    begun, pause = True, _FIRST_PAUSE
                    for event in message.events:
                        yield event
                        since = event.server_seq
            except grpc.RpcError as error:
                if not begun or error.code() not in _RETRIED:
                    raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def line_of(event: pb.Event) -> str:
    """Return an event as one line for people, in which nothing that an author wrote can move the cursor."""
    at = datetime.fromtimestamp(event.create_time.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    payload = event.json if event.WhichOneof("payload") == "json" else f"{len(event.binary):,} bytes"
    words = (
        str(event.server_seq),
        f"{at}.{event.create_time.nanos // 1_000:06}Z",
        event.actor_id if event.HasField("actor_id") else "-",
        event.type if event.HasField("type") else "-",
        payload,
    )
    return "  ".join(map(_printable, words))


def _printable(text: str) -> str:
    """Replace line breaks by spaces and other control characters by their escapes."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode() for c in text
    )
