"""The owner of background tasks: each has a name, and none dies unseen."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

_log = structlog.get_logger(__name__)


class BackgroundTasks:
    """Tasks that live until they end or are cancelled together."""

    def __init__(self, on_death: Callable[[], None]) -> None:
        """Prepare.

        Args:
            on_death: Called when a task dies of an exception. What it did is then no longer done, so the process
                has to go.
        """
        self._on_death = on_death
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a coroutine as a task."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("a background task died", task=task.get_name(), exc_info=error)
            self._on_death()
