"""TCP connections whose other end may vanish without a word, with its machine or behind a firewall."""

from __future__ import annotations

import socket

# Seconds of silence before the other end is probed, and between probes; probes; milliseconds that data waits.
OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


def keep_alive(connection: socket.socket) -> socket.socket:
    """Have the system probe a silent connection, and break it after about a minute; returns it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in OPTIONS.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
