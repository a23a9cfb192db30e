"""Closing the connections of clients, which grpc has no call for."""

import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import unquote


def close_connections(peers: Iterable[str]) -> list[str]:
    """Shut down the sockets of clients, and return the clients that had one.

    Args:
        peers: As grpc names clients, such as `ipv4:127.0.0.1:4000` or `ipv6:%5B::1%5D:4000`.
    """
    wanted = {_address(peer): peer for peer in peers}
    closed: list[str] = []
    for name in os.listdir("/dev/fd") if wanted else ():
        with suppress(OSError):  # it was closed meanwhile, or is no connection
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    address, port, *_ = connection.getpeername()
                    if peer := wanted.get((address.removeprefix("::ffff:"), str(port))):
                        connection.shutdown(socket.SHUT_RDWR)
                        closed.append(peer)
    return closed


def _address(peer: str) -> tuple[str, str]:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), port
