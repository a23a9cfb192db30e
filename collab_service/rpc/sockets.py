"""Closing the connections of clients, which grpc has no call for."""

import os
import socket
import stat
from contextlib import suppress
from urllib.parse import unquote


def close_connection(peer: str) -> bool:
    """Shut down the socket of a client; False when there is none (any more).

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
