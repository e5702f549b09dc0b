"""TCP ports of 127.0.0.1 for servers that we start: known before the server is up, and the same again after a restart."""

from __future__ import annotations

import socket
import sys


class Port:
    """A free port kept for us until closed.

    On Linux it stays bound, not listening, with SO_REUSEADDR: the kernel gives it to nobody who asks for a free port, while a
    server that sets the same option (gRPC, PostgreSQL, Valkey and Python's HTTP server do) may bind and listen. Elsewhere it is only
    found free, and could be lost to another process before our server listens.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self._socket.close()

    def __repr__(self) -> str:
        return f"<Port {self.address}>"

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.number}"

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()
