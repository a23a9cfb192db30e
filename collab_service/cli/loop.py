"""The event loop, and running a command's work on it."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from collab_service.cli.failure import ExitStatus

if sys.platform != "win32":
    import uvloop


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return the fastest event loop there is here."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], *, interrupted: ExitStatus = ExitStatus.INTERRUPTED) -> T:
    """Do a command's work, and return what that returns.

    Ctrl-C cancels it, so that it can say what it has done; told again, it ends at once.

    Args:
        work: What to do.
        interrupted: The exit status when it was cancelled and had nothing to say.
    """
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(interrupted)
