"""Calling the service through its client in the tests."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from collab_service.client import RetryPolicy, ServiceError
from tests.processes import ServeProcess

MISSING = 10**15
"""A session that there is not."""

QUICK = RetryPolicy(first_pause=0.01, longest_pause=0.1)
"""For services that are away for a moment."""
ONCE = RetryPolicy(attempts=1)
THRICE = RetryPolicy(first_pause=0.01, attempts=3)


def unique(prefix: str) -> str:
    """Return a name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def failure(call: Awaitable[object]) -> ServiceError:
    """Make a call that has to fail with one of the client's errors."""
    with pytest.raises(ServiceError) as caught:
        await call
    return caught.value


@asynccontextmanager
async def serving(*arguments: str, **settings: Any) -> AsyncIterator[ServeProcess]:
    """Run a `collab serve` for the length of the block, and the loop while it starts and stops."""
    process = ServeProcess(*arguments, **settings)
    await asyncio.to_thread(process.__enter__)
    try:
        yield process
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)
