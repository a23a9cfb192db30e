"""Messages that their readers neither take nor give up.

A stream that was ended for taking nothing stays: its status waits behind the message, and grpc has no way to drop that.
What such messages may take of the memory is bounded by closing connections.
"""

import os
import socket
import stat
from collections import Counter
from contextlib import suppress
from urllib.parse import unquote

import structlog

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
            if _close_connection(peer):
                _log.warning("a client takes nothing, its connection is closed", peer=peer, stuck_bytes=stuck)


def _close_connection(peer: str) -> bool:
    """Shut down the socket of a client, which grpc has no call for; False when there is none (any more).

    Args:
        peer: As grpc names clients, such as `ipv4:127.0.0.1:4000` or `ipv6:%5B::1%5D:4000`.
    """
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    wanted = host.strip("[]"), int(port)
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # it was closed meanwhile, or is no connection
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    address, number, *_ = connection.getpeername()
                    if (address.removeprefix("::ffff:"), number) == wanted:
                        connection.shutdown(socket.SHUT_RDWR)
                        return True
    return False
