"""One HTTP/1.1 keep-alive connection of the load generator: the request is built once, the answer's head is read as far as it must be."""

from __future__ import annotations

import socket
from typing import Final

from plait_bench.connection import Connection, Finished

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = b"content-length:"
_CHUNKED: Final = b"transfer-encoding: chunked"
_LAST_CHUNK: Final = b"0\r\n\r\n"


def build_request(path: str, body: bytes, *, host: str = "127.0.0.1", content_type: str = "application/octet-stream") -> bytes:
    """Return a POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def parse_answer(data: bytes | bytearray) -> tuple[int, int, int] | None:
    """Return (status, start of the body, end of the answer) once the whole answer is in `data`, else None.

    Raises ValueError for an answer without a length.
    """
    body = data.find(_HEAD_END) + len(_HEAD_END)
    if body < len(_HEAD_END):
        return None
    head = bytes(data[:body]).lower()
    status = int(head[9:12])
    at = head.find(_LENGTH)
    if at >= 0:
        end = body + int(head[at + len(_LENGTH) : head.index(b"\r\n", at)])
    elif _CHUNKED in head:
        end = _end_of_chunks(data, body)
    else:
        raise ValueError("the answer has neither a content-length nor chunks")
    return (status, body, end) if 0 <= end <= len(data) else None


def _end_of_chunks(data: bytes | bytearray, at: int) -> int:
    """Return where a chunked body ends, -1 where it is not all here."""
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(bytes(data[at:line_end]).split(b";")[0], 16)
        at = line_end + 2 + size + 2
        if size == 0:
            return at
    return -1


class Http1Connection(Connection):
    """One caller: a request is sent once the one before was answered."""

    most_calls = 1

    def __init__(self, sock: socket.socket, request: bytes) -> None:
        super().__init__(sock)
        self._request = request
        self._began_s = 0.0
        self._data = bytearray()

    def begin(self, now_s: float) -> None:
        """Send the next request."""
        self._began_s = now_s
        self._send(self._request)

    def receive(self) -> list[Finished]:
        """Read what is there; return the call that ended, if it did."""
        self._data += self._read()
        answer = parse_answer(self._data)
        if answer is None:
            return []
        status, start, end = answer
        if self.first_body is None:
            self.first_body = bytes(self._data[start:end])
        del self._data[:end]
        return [(self._began_s, status)]
