"""How much may be on its way into this process at once.

Appends that wait are bounded by the sequencer's queue. But a call gets there only once its request has been received
and decoded, and under a multiple of the load that can be carried, the memory and the time would go into that: 4,000
callers with 1 MB each took 12 GB, and of 140 appends a second left 14. So a call is refused before its request is
received: when those in progress hold too many bytes of requests, or too many requests are being received.
"""

import asyncio
from typing import Any, NamedTuple

import grpc

_REQUESTS = 1_024
"""Requests that may be received at once, however small they usually are."""
_PATIENCE = 5.0
"""Seconds after which a request that has not come in full gives up its place to another."""


class Handlers(NamedTuple):
    """How calls of one method are carried out."""

    carry_out: "grpc.RpcMethodHandler[Any, Any]"
    refuse: "grpc.RpcMethodHandler[Any, Any] | None"
    """Answers without receiving the request; None where the method takes a stream of them, which it bounds itself."""


class Admission(grpc.GenericRpcHandler):
    """Chooses how a call is handled, in the task of the call, when nothing but its headers has come."""

    def __init__(self, *, held: int, received: int) -> None:
        """Admit calls up to two bounds.

        Args:
            held: Bytes of requests that calls in progress may hold.
            received: Bytes of requests that may be received at once.
        """
        self.methods: dict[str, Handlers] = {}
        """By path."""
        self._max_held = held
        self._max_received = received
        self._held = 0
        self._usual = 1.0
        """Bytes of a request of late: how large one is going to be is not known before it has come."""
        self._receiving: dict[asyncio.Task[Any], float] = {}
        self._received: dict[asyncio.Task[Any], int] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler for a call; None when there is no such method."""
        handlers = self.methods.get(handler_call_details.method)
        if handlers is None:
            return None
        return handlers.carry_out if handlers.refuse is None or self._admit() else handlers.refuse

    def received(self, request: bytes) -> None:
        """Take note that the request of the current task's call has come."""
        task = asyncio.current_task()
        if task is not None and self._receiving.pop(task, None) is not None:
            size = len(request)
            self._usual += (size - self._usual) / 16
            self._received[task] = size
            self._held += size

    def _admit(self) -> bool:
        if self._held >= self._max_held:
            return False
        task = asyncio.current_task()
        assert task is not None
        now = task.get_loop().time()
        if len(self._receiving) >= min(_REQUESTS, self._max_received / self._usual):
            slowest, since = next(iter(self._receiving.items()))
            if now - since < _PATIENCE:
                return False
            del self._receiving[slowest]
            slowest.cancel()
        self._receiving[task] = now
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._receiving.pop(task, None)
        self._held -= self._received.pop(task, 0)
