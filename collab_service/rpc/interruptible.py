"""What a task waits for, and somebody else may end."""

import asyncio

from msgspec import Struct


class Interruptible(Struct, eq=False):
    """A wait of one task, which is told apart from a task that is cancelled."""

    task: "asyncio.Task[object]"
    since: float
    """When it began, by the loop's clock."""
    is_ended: bool = False

    def end(self) -> None:
        """Interrupt it: the task is thrown `CancelledError`."""
        self.is_ended = True
        self.task.cancel()

    def was_only_ended(self) -> bool:
        """Tell, once its task was cancelled, whether that was `end` and nobody else; if so, it is no longer."""
        return self.is_ended and self.task.uncancel() == 0
