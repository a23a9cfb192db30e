"""How a command ends: with an exit status, and when it fails with one sentence that says what is wrong and what to do.

Never with a traceback.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from rich.console import Console
from rich.text import Text

from collab_service.cli.output import printable
from collab_service.client import (
    BrokenLog,
    DeadlineExceeded,
    IdempotencyKeyReused,
    InternalError,
    Overloaded,
    ServerSeqConflict,
    ServiceError,
    SessionNotFound,
    Unavailable,
)


class ExitStatus(IntEnum):
    """What a command's exit status means; `docs/command-line.md` tells users."""

    DONE = 0
    FAILED = 1
    """What was asked cannot be done; the sentence says why."""
    USAGE = 2
    """The command line is wrong."""
    UNAVAILABLE = 3
    """The service does not answer or cannot work just now; the same command may succeed later."""
    NOT_FOUND = 4
    """There is no such session."""
    CONFLICT = 5
    """The session is not as expected: `--expect`, or a key that is stored with other content."""
    CHECK_FAILED = 6
    """What was checked is not right: a broken chain, a file that is not whole, an unwell service."""
    INTERRUPTED = 130
    """Ctrl-C ended work that was not done."""


class CommandError(Exception):
    """The command cannot do what was asked; the message is a sentence."""

    def __init__(self, sentence: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(sentence)
        self.status = status


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Turn the errors that a command expects into a sentence on standard error and an exit status."""
    try:
        yield
    except CommandError as error:
        _say(str(error))
        sys.exit(error.status)
    except ServiceError as error:
        _say(_of_service(error))
        sys.exit(status_of(error))
    except BrokenLog as error:
        _say(str(error))
        sys.exit(ExitStatus.CHECK_FAILED)
    except OSError as error:
        if error.filename is None:  # then it was standard output, as on a disk that is full
            _let_go_of_standard_output()
        _say(
            f"cannot {'use ' + str(error.filename) if error.filename else 'write to standard output'}: {error.strerror}"
        )
        sys.exit(ExitStatus.FAILED)


@contextmanager
def ended_by_its_reader() -> Iterator[None]:
    """End well when nobody reads standard output any more, for what goes on until then."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_standard_output()
        sys.exit(ExitStatus.DONE)


def _of_service(error: ServiceError) -> str:
    if isinstance(error, SessionNotFound):
        return f"{error}; see those there are with: collab session list"
    if isinstance(error, InternalError) and error.request_id:
        return f"the service failed: {error}"
    text = "the service did not answer in time" if isinstance(error, DeadlineExceeded) else str(error)
    if error.side_effects == "unknown":
        return f"{text}; whether it was written is not known, so look before you do it again"
    return text


def status_of(error: ServiceError) -> ExitStatus:
    """Return the exit status for an error of the service."""
    match error:
        case SessionNotFound():
            return ExitStatus.NOT_FOUND
        case ServerSeqConflict() | IdempotencyKeyReused():
            return ExitStatus.CONFLICT
        case Unavailable() | Overloaded() | DeadlineExceeded():
            return ExitStatus.UNAVAILABLE
    return ExitStatus.FAILED


def _say(sentence: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("collab: ", "bold red"), printable(sentence)))


def _let_go_of_standard_output() -> None:
    # What is still buffered cannot be written either, and Python would complain about that at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
