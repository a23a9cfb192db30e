"""Reaching the service, and the session that somebody has named."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import typer

from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.client import CollabClient, DeadlineExceeded, ServiceError, Session, SessionNotFound, Unavailable

Target = Annotated[
    str,
    typer.Option(envvar="COLLAB_TARGET", metavar="HOST:PORT", help="The service's gRPC address."),
]
SessionName = Annotated[
    str,
    typer.Argument(
        metavar="SESSION", help="The session's number, or its room (`room:NAME` for a room that is a number)."
    ),
]


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[CollabClient]:
    """Provide a client of a service that answers and can work.

    Raises:
        CommandError: There is none.
    """
    host, colon, port = target.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    if not (host and colon and is_port) or host.startswith(("http:", "https:")):
        raise CommandError(
            f"--target '{target}' is no address of a service; that looks like 127.0.0.1:50051", ExitStatus.USAGE
        )
    async with CollabClient(target) as client:
        try:
            serving = await client.is_serving()
        except (Unavailable, DeadlineExceeded) as error:
            raise CommandError(
                f"nothing that speaks gRPC answers at {target} ({_cause(error)}); is that the service's gRPC address? "
                "Start one with: collab serve",
                ExitStatus.UNAVAILABLE,
            ) from error
        except ServiceError as error:
            raise CommandError(f"what answers at {target} is no collab-service: {error}") from error
        if not serving:
            raise CommandError(
                f"the service at {target} is there but cannot work just now: it is stopping, or its database is away; "
                "its log says more, and so does: collab doctor",
                ExitStatus.UNAVAILABLE,
            )
        yield client


def _cause(error: ServiceError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "there is no answer in time"
    return str(error).removeprefix("the service does not answer: ")


async def find_session(client: CollabClient, name: str) -> Session:
    """Return the session of this number, or with this room.

    Raises:
        SessionNotFound: There is none of this number.
        CommandError: There is none with this room.
    """
    if is_number(name):
        return await client.get_session(int(name))
    room = name.removeprefix("room:")
    try:
        return await client.get_session(room=room)
    except SessionNotFound as error:
        raise CommandError(
            f"there is no session with the room '{room}'; see those there are with: collab session list",
            ExitStatus.NOT_FOUND,
        ) from error


def is_number(name: str) -> bool:
    """Tell whether somebody means a session by its number."""
    return name.isascii() and name.isdigit()
