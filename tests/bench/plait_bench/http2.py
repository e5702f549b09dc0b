"""One HTTP/2 connection of the load generator, as far as unary gRPC needs it (RFC 9113): calls built once, stream ids patched in.

Flow control is honoured both ways. A call whose whole body fits the windows leaves in one piece; else its bytes go as the server
makes room. What comes is counted by frames; of the trailers only grpc-status is read.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from plait_bench import hpack
from plait_bench.connection import Closed, Connection, Finished

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEAD_BYTES: Final = 9
_TABLE_SIZE, _ENABLE_PUSH, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 2, 3, 4, 5
_MOST_WINDOW: Final = (1 << 31) - 1
_DEFAULT_WINDOW: Final = 65_535
_REPLENISH_AT: Final = 1 << 29
_HANDSHAKE_S: Final = 10.0
RESET: Final = -1  # the status of a call whose stream the server reset
NO_STATUS: Final = -2  # the status of a call that ended without grpc-status
_MOST_STREAM_ID: Final = 1 << 30


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack(">I", len(payload) << 8 | kind) + struct.pack(">BI", flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", key, value) for key, value in values.items()))


def window_update(stream: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcRequest:
    """One unary call: "/package.Service/Method", the serialized message, metadata, and a budget in milliseconds (0 = none)."""

    method: str
    message: bytes
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_ms: int = 0

    def block(self, authority: str) -> bytes:
        """Return the header block."""
        fields: list[tuple[str | int, str]] = [(4, self.method), (1, authority), ("te", "trailers"), (31, "application/grpc")]
        if self.timeout_ms:
            fields.append(("grpc-timeout", f"{self.timeout_ms}m"))
        return b"\x83\x86" + b"".join(hpack.field(name, value) for name, value in (*fields, *self.metadata))  # POST, http

    def body(self) -> bytes:
        """Return what the DATA frames carry: the message behind gRPC's five bytes."""
        return struct.pack(">BI", 0, len(self.message)) + self.message


class Template:
    """A call as it goes over the wire, with the places of its stream ids."""

    def __init__(self, block: bytes, body: bytes, max_frame: int) -> None:
        frames = [frame(HEADERS, END_HEADERS, 0, block)]
        frames += [frame(DATA, 0, 0, body[at : at + max_frame]) for at in range(0, len(body), max_frame)]
        self.bytes = bytearray(b"".join(frames))
        self._ids, at = [], 0
        for one in frames:
            self._ids.append(at + 5)
            at += len(one)
        self.bytes[self._ids[-1] - 1] |= END_STREAM
        self._pack = struct.Struct(">I").pack_into

    def addressed(self, stream: int) -> bytearray:
        """Return the bytes for this stream; they hold until the next call."""
        for at in self._ids:
            self._pack(self.bytes, at, stream)
        return self.bytes


@dataclass(slots=True)
class _Waiting:
    """A call whose body the windows did not take whole."""

    stream: int
    sent: int
    window: int


class GrpcConnection(Connection):
    """Any number of unary calls of one kind at once, as many as the server's settings allow."""

    def __init__(self, sock: socket.socket, request: GrpcRequest) -> None:
        super().__init__(sock)
        host, port = sock.getpeername()[:2]
        self._block = request.block(f"{host}:{port}")
        self._body = request.body()
        self.most_calls = 1 << 31
        self._max_frame = 16_384
        self._initial_window = _DEFAULT_WINDOW
        self._window = _DEFAULT_WINDOW
        self._waiting: deque[_Waiting] = deque()
        self._next_stream = 1
        self._began: dict[int, float] = {}
        self._status: dict[int, int] = {}
        self._consumed = 0
        self._data = b""
        self._first: bytearray | None = bytearray()
        self._acknowledged = False
        self._shake_hands()
        self._template = Template(self._block, self._body, self._max_frame)

    def begin(self, now_s: float) -> None:
        """Send one call, or as much of it as the windows take."""
        if len(self._began) >= self.most_calls:
            raise Closed(f"the server allows {self.most_calls} calls at once on a connection: use more connections")
        stream = self._next_stream
        self._next_stream += 2
        if stream >= _MOST_STREAM_ID:
            raise Closed("the connection ran out of stream ids")
        self._began[stream] = now_s
        size = len(self._body)
        if not self._waiting and size <= self._window and size <= self._initial_window:
            self._window -= size
            self._send(self._template.addressed(stream))
            return
        self._send(frame(HEADERS, END_HEADERS, stream, self._block))
        self._waiting.append(_Waiting(stream, 0, self._initial_window))
        self._send_bodies()

    def receive(self) -> list[Finished]:
        """Read what is there; return the calls that ended."""
        data = self._data + self._read() if self._data else self._read()
        finished: list[Finished] = []
        at, size = 0, len(data)
        while size - at >= HEAD_BYTES:
            end = at + HEAD_BYTES + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
            if end > size:
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            self._frame(data[at + 3], data[at + 4], stream, data[at + HEAD_BYTES : end], finished)
            at = end
        self._data = data[at:]
        if self._consumed >= _REPLENISH_AT:
            self._send(window_update(0, self._consumed))
            self._consumed = 0
        return finished

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes, finished: list[Finished]) -> None:
        if kind == DATA:
            self._consumed += len(payload)
            if self._first is not None and stream == 1:
                self._first += _content(flags, payload)
        elif kind == HEADERS:
            status = hpack.grpc_status(_content(flags, payload))
            if status is not None:
                self._status[stream] = status
        elif kind == RST_STREAM:
            self._forget(stream)
            self._status.setdefault(stream, RESET)  # a reset behind the trailers only says: no more of your body
            self._end(stream, finished)
            return
        else:
            self._control(kind, flags, stream, payload)
            return
        if flags & END_STREAM:
            self._end(stream, finished)

    def _end(self, stream: int, finished: list[Finished]) -> None:
        began_s = self._began.pop(stream, None)
        status = self._status.pop(stream, NO_STATUS)
        if began_s is None:
            return
        if stream == 1 and self._first is not None:
            self.first_body, self._first = bytes(self._first[5:]), None
        self._forget(stream)
        finished.append((began_s, status))

    def _forget(self, stream: int) -> None:
        """Send no more of a body that nobody waits for."""
        if self._waiting:
            self._waiting = deque(w for w in self._waiting if w.stream != stream)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big") & _MOST_WINDOW
            if stream == 0:
                self._window += increment
            else:
                for waiting in self._waiting:
                    if waiting.stream == stream:
                        waiting.window += increment
            self._send_bodies()
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and flags & ACK:
            self._acknowledged = True
        elif kind == SETTINGS:
            for at in range(0, len(payload), 6):
                self._set(*struct.unpack_from(">HI", payload, at))
            self._send(frame(SETTINGS, ACK, 0))
            self._send_bodies()
        elif kind == GOAWAY:
            raise Closed(f"the server says GOAWAY: error {int.from_bytes(payload[4:8], 'big')} {payload[8:].decode(errors='replace')}")
        elif kind == CONTINUATION:
            raise Closed("the server's headers do not fit one frame")

    def _set(self, key: int, value: int) -> None:
        if key == _INITIAL_WINDOW:
            for waiting in self._waiting:
                waiting.window += value - self._initial_window
            self._initial_window = value
        elif key == _MAX_STREAMS:
            self.most_calls = value
        elif key == _MAX_FRAME:
            self._max_frame = min(value, 1 << 20)

    def _send_bodies(self) -> None:
        """Send of the waiting bodies, in turn, what the windows take."""
        for waiting in list(self._waiting):
            while (room := min(self._window, waiting.window, self._max_frame)) > 0 and waiting.sent < len(self._body):
                part = self._body[waiting.sent : waiting.sent + room]
                waiting.sent += len(part)
                waiting.window -= len(part)
                self._window -= len(part)
                self._send(frame(DATA, END_STREAM if waiting.sent == len(self._body) else 0, waiting.stream, part))
            if waiting.sent == len(self._body):
                self._waiting.remove(waiting)

    def _shake_hands(self) -> None:
        """Exchange settings, so that the first call is sent by the server's and without a dynamic table on either side."""
        self.sock.settimeout(_HANDSHAKE_S)
        ours = settings({_TABLE_SIZE: 0, _ENABLE_PUSH: 0, _INITIAL_WINDOW: _MOST_WINDOW})
        self.sock.sendall(PREFACE + ours + window_update(0, _MOST_WINDOW - _DEFAULT_WINDOW))
        while not self._acknowledged:
            self.receive()
        self.sock.setblocking(False)


def _content(flags: int, payload: bytes) -> bytes:
    """Return a frame's payload without padding and priority."""
    if flags & PADDED:
        payload = payload[1 : len(payload) - payload[0]]
    return payload[5:] if flags & PRIORITY else payload
