"""Messages that their readers neither take nor give up.

A stream that was ended for taking nothing stays: its status waits behind the message, and grpc has no way to drop that.
What such messages may take of the memory is bounded by closing connections.
"""

from collections import Counter

import structlog

from collab_service.rpc.sockets import close_connections

_log = structlog.get_logger(__name__)

_MOST_BYTES = 64 * 1024 * 1024


class StuckMessages:
    """What was not taken on streams that were ended for it, by the client's address."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def add(self, peer: str, size: int) -> None:
        """Count a message that was not taken; where it is too much, close the connections on which most is stuck.

        Whether one is taken later cannot be seen, so it counts for as long as its connection may be there.

        Args:
            peer: The client's address, as grpc names it.
            size: Bytes of the message.
        """
        self._bytes[peer] += size
        while self._bytes.total() > _MOST_BYTES:
            peer, stuck = self._bytes.most_common(1)[0]
            del self._bytes[peer]
            if close_connections([peer]):
                _log.warning("a client takes nothing, its connection is closed", peer=peer, stuck_bytes=stuck)
