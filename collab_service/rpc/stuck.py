"""Messages that their readers neither take nor give up.

A stream that was ended for taking nothing stays: its status waits behind the message, and grpc has no way to drop that.
What such messages may take of the memory is bounded by closing connections.
"""

from collections import Counter
from typing import Any, cast

import structlog

from collab_service.rpc.reads import Context
from collab_service.rpc.sockets import close_connections

_log = structlog.get_logger(__name__)

_MOST_BYTES = 64 * 1024 * 1024


class StuckMessages:
    """What was not taken on streams that were ended for it, for as long as it lies there."""

    def __init__(self) -> None:
        self._of_calls: dict[Context, tuple[str, int]] = {}
        """The client's address, as grpc names it, and the bytes."""
        self._bytes = 0

    def add(self, context: Context, size: int) -> None:
        """Count a message that was not taken; where it is too much, close the connections on which most is stuck.

        Args:
            context: The call; it is over once the message was taken and its status after it, or the connection is lost.
            size: Bytes of the message.
        """
        self._of_calls[context] = context.peer(), size
        self._bytes += size
        context.add_done_callback(cast(Any, self._forget))
        while self._bytes > _MOST_BYTES:
            self._close_the_worst()

    def _close_the_worst(self) -> None:
        by_peer: Counter[str] = Counter()
        for peer, size in self._of_calls.values():
            by_peer[peer] += size
        worst, stuck = by_peer.most_common(1)[0]
        for context in [context for context, (peer, _) in self._of_calls.items() if peer == worst]:
            self._forget(context)
        if close_connections([worst]):
            _log.warning("a client takes nothing, its connection is closed", peer=worst, stuck_bytes=stuck)

    def _forget(self, context: Context) -> None:
        _, size = self._of_calls.pop(context, ("", 0))
        self._bytes -= size
