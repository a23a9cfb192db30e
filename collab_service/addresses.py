"""Addresses to listen on: `HOST:PORT`, whether they are free, and who can reach them."""

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Place = tuple[socket.AddressFamily, tuple[Any, ...]]
"""A family of addresses, and an address as its sockets take it."""


class AddressError(Exception):
    """The address cannot be listened on; the message is a sentence that says why."""


def split_address(address: str) -> tuple[str, int]:
    """Return the host and the port of `HOST:PORT`.

    Raises:
        AddressError: It is none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise AddressError(f"{address!r} is no address; it looks like 127.0.0.1:50051 or [::1]:50051")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return `HOST:PORT`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_place(address: str, *, option: str) -> Place:
    """Return the family and the place of an address that nobody listens on, the first where a name has several.

    The check is to bind it without `SO_REUSEPORT`: with that, one comes to share a port with whoever has set it, too;
    and grpc is content with one of several places that a name such as `localhost` stands for.

    Args:
        address: `HOST:PORT`.
        option: The option that chooses another address, for the error.

    Raises:
        AddressError: Somebody listens there, or it is not an address of this machine.
    """
    free: list[Place] = []
    try:
        for family, place in _places(address):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
                try:
                    probe.bind(place)
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:  # as for ::1 where there is no IPv6
                        raise
                else:
                    free.append((family, place))
        return free[0]
    except (OSError, IndexError) as error:
        raise cannot_listen(address, option=option) from error


@contextmanager
def held_address(address: str, *, option: str) -> Iterator[str]:
    """Keep an address for processes of ours, without listening; yield it, with the port that was chosen if it was 0.

    Raises:
        AddressError: Somebody else listens there, or it is not an address of this machine.
    """
    family, place = free_place(address, option=option)
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind(place)
        except OSError:
            # Connections linger of a server that was alone here. Only now, since it lets others bind the port as well.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind(place)
            except OSError as error:
                raise cannot_listen(address, option=option) from error
        yield join_address(split_address(address)[0], held.getsockname()[1])


def listening_socket(address: str, *, share: bool, option: str) -> socket.socket:
    """Return a socket that is bound to an address; to share it with processes of ours, somebody must hold it.

    Raises:
        AddressError: It cannot be listened on.
    """
    family, place = _places(address)[0] if share else free_place(address, option=option)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(place)
    except OSError as error:
        listener.close()
        raise cannot_listen(address, option=option) from error
    return listener


def cannot_listen(address: str, *, option: str) -> AddressError:
    """Return the error that says so."""
    return AddressError(
        f"cannot listen on {address}: it is in use or not an address of this machine; choose another with {option}"
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _places(address: str) -> list[Place]:
    host, port = split_address(address)
    return [(family, place) for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
