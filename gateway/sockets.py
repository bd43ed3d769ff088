"""Listening sockets: bound before anything else is made, so that whoever owns them can hand them on."""

import socket
import sys

BACKLOG = 4096


def bind(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of ``host``, all on one port. Raises `OSError` that names what is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(error.errno, f"cannot listen on {host}: {error.strerror}") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(sock := socket.socket(family, kind, protocol))
            if sys.platform != "win32":  # there it would let two processes have the same port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            sock.listen(BACKLOG)
            sock.setblocking(False)
            port = sock.getsockname()[1]  # where any port would do, it is the same for all addresses
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return sockets


def accept_all(sockets: list[socket.socket]) -> list[socket.socket]:
    """The connections that wait to be accepted: closing their socket would reset them."""
    accepted = []
    for sock in sockets:
        while True:
            try:
                accepted.append(sock.accept()[0])
            except OSError:  # there is none left; or one of them is gone already, and those behind it are few
                break
    return accepted
