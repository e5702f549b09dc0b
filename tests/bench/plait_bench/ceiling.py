"""What the load generator can do at most: its rate against servers that read a request and answer the same bytes, and nothing else.

Those servers are Python too and busier than the generator, so the figure is a lower bound; the generator's CPU time per call beside it
says how far above it the real limit lies. `python -m plait_bench.ceiling http|grpc PORT` is such a server.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
from typing import Any, Final

from plait_bench import hpack, http2

_READ_BYTES: Final = 1 << 18
_WINDOW: Final = (1 << 31) - 1


class HttpAnswers:
    """Reads POSTs by their length, answers each with the same body."""

    def __init__(self, body: bytes) -> None:
        self._answer = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        self._data = bytearray()

    def greeting(self) -> bytes:
        """Return what is sent first."""
        return b""

    def take(self, data: bytes) -> bytes:
        """Return what to send after these bytes."""
        self._data += data
        out = b""
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            at = head.index(b"content-length:") + 15
            size = end + 4 + int(head[at:].split(b"\r\n")[0])
            if size > len(self._data):
                break
            del self._data[:size]
            out += self._answer
        return out


class GrpcAnswers:
    """Reads HTTP/2 frames, answers each stream that ended with the same message; grants all the window there is."""

    def __init__(self, body: bytes) -> None:
        self._head = b"\x88" + hpack.field("content-type", "application/grpc")
        self._body = struct.pack(">BI", 0, len(body)) + body
        self._trailers = hpack.field("grpc-status", "0")
        self._data = b""
        self._preface = len(http2.PREFACE)
        self._consumed = 0

    def greeting(self) -> bytes:
        """Return what is sent first."""
        return http2.settings({4: _WINDOW}) + http2.window_update(0, _WINDOW - 65_535)

    def take(self, data: bytes) -> bytes:
        """Return what to send after these bytes."""
        data = self._data + data
        out, at = b"", 0
        if self._preface:
            if len(data) < self._preface:
                self._data = data
                return b""
            at, self._preface = self._preface, 0
        while len(data) - at >= http2.HEAD_BYTES:
            end = at + http2.HEAD_BYTES + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big")
            if kind == http2.DATA:
                self._consumed += end - at - http2.HEAD_BYTES
                out += self._answer(stream) if flags & http2.END_STREAM else b""
            elif kind == http2.SETTINGS and not flags & http2.ACK:
                out += http2.frame(http2.SETTINGS, http2.ACK, 0)
            at = end
        self._data = data[at:]
        if self._consumed > _WINDOW // 2:
            out += http2.window_update(0, self._consumed)
            self._consumed = 0
        return out

    def _answer(self, stream: int) -> bytes:
        return (
            http2.frame(http2.HEADERS, http2.END_HEADERS, stream, self._head)
            + http2.frame(http2.DATA, 0, stream, self._body)
            + http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, self._trailers)
        )


def serve(listener: socket.socket, kind: type[HttpAnswers | GrpcAnswers], body: bytes) -> None:
    """Answer every connection until killed."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    sock, _ = listener.accept()
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    answers = kind(body)
                    sock.sendall(answers.greeting())
                    selector.register(sock, selectors.EVENT_READ, (sock, answers))
                elif not _handle(*key.data):
                    selector.unregister(key.data[0])
                    key.data[0].close()


def _handle(sock: socket.socket, answers: Any) -> bool:
    try:
        data = sock.recv(_READ_BYTES)
        if out := answers.take(data):
            sock.sendall(out)
    except ConnectionError:
        return False
    return bool(data)


def main() -> None:
    """Serve until killed."""
    kind, port, size = sys.argv[1:]
    kinds: dict[str, type[HttpAnswers | GrpcAnswers]] = {"http": HttpAnswers, "grpc": GrpcAnswers}
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        serve(listener, kinds[kind], bytes(int(size)))


if __name__ == "__main__":
    main()
