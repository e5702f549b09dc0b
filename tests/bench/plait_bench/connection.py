"""What the load generator needs of a connection, whatever it speaks: non-blocking bytes out and in."""

from __future__ import annotations

import socket
from typing import Final

Finished = tuple[float, int]  # when the call began, and its status: HTTP's, or gRPC's
_READ_BYTES: Final = 1 << 18


class Closed(Exception):
    """The server closed the connection, or broke the protocol."""


class Connection:
    """A non-blocking socket with a queue of bytes that did not fit into it. `first_body`: the first answer, to be checked."""

    most_calls: int

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sock = sock
        self.first_body: bytes | None = None
        self._unsent = bytearray()

    @property
    def blocked(self) -> bool:
        """Whether bytes wait for room in the socket."""
        return bool(self._unsent)

    def begin(self, now_s: float) -> None:
        """Start one call."""
        raise NotImplementedError

    def receive(self) -> list[Finished]:
        """Read what is there; return the calls that ended."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what waits."""
        data, self._unsent = self._unsent, bytearray()
        self._send(data)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def _send(self, data: bytes | bytearray) -> None:
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._unsent += memoryview(data)[sent:]

    def _read(self) -> bytes:
        try:
            data = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise Closed("the server closed the connection")
        return data
