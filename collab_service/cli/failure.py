"""How a command fails: one sentence that says what is wrong and what to do, and an exit status; never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from rich.console import Console
from rich.text import Text

from collab_service.model.errors import CollabError
from collab_service.rpc.server import AddressError
from collab_service.storage.embedded import EmbeddedError
from collab_service.storage.schema import UnsuitableDatabase


class CommandError(Exception):
    """The command cannot do what was asked; the message is a sentence."""


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Turn the errors that a command expects into a sentence on standard error and exit status 1."""
    try:
        yield
    except (CommandError, EmbeddedError, AddressError, UnsuitableDatabase, CollabError) as error:
        _say(str(error))
    except grpc.RpcError as error:
        _say(_of_rpc(error))


def _of_rpc(error: grpc.RpcError) -> str:
    # Every RpcError that a synchronous stub raises is a call as well.
    code: grpc.StatusCode = error.code()
    details: str = error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the service does not answer ({details}); is this its address? Start one with: collab serve"
    return f"the service answered {code.name}: {details}"


def _say(sentence: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("collab: ", "bold red"), sentence))
    sys.exit(1)
