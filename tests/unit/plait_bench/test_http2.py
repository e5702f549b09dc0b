"""HTTP/2 of the load generator: frames, and flow control against a peer that is miserly with its windows."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait_bench import hpack, http2
from plait_bench.connection import Closed, Finished
from plait_bench.http2 import GrpcConnection, GrpcRequest

CALL = GrpcRequest(method="/a.B/C", message=b"m" * 5000, metadata=(("x-token", "t"),), timeout_ms=250)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while data:
        end = http2.HEAD_BYTES + int.from_bytes(data[:3], "big")
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]))
        data = data[end:]
    return found


@given(kind=st.integers(0, 255), flags=st.integers(0, 255), stream=st.integers(0, (1 << 31) - 1), payload=st.binary(max_size=99))
def test_frames_are_as_the_rfc_draws_them(kind: int, flags: int, stream: int, payload: bytes) -> None:
    assert frames(http2.frame(kind, flags, stream, payload) * 2) == [(kind, flags, stream, payload)] * 2


@given(size=st.integers(0, 3000), most=st.integers(100, 1000), streams=st.lists(st.integers(1, 1 << 30), min_size=1, max_size=3))
def test_a_template_is_whole_for_every_stream(size: int, most: int, streams: list[int]) -> None:
    body = GrpcRequest(method="/a.B/C", message=bytes(size)).body()
    template = http2.Template(b"block", body, most)
    for stream in streams:
        head, *data = frames(bytes(template.addressed(stream)))
        assert head == (http2.HEADERS, http2.END_HEADERS, stream, b"block")
        assert b"".join(payload for *_, payload in data) == body
        assert [flags for _, flags, _, _ in data] == [0] * (len(data) - 1) + [http2.END_STREAM]
        assert all(stream_ == stream and len(payload) <= most for _, _, stream_, payload in data)


def test_a_call_carries_its_metadata_and_budget() -> None:
    block = CALL.block("host:1")
    for part in (b"/a.B/C", b"host:1", b"\x07x-token\x01t", b"\x0cgrpc-timeout\x04250m", b"\x02te\x08trailers", b"application/grpc"):
        assert part in block
    assert b"grpc-timeout" not in GrpcRequest(method="/a.B/C", message=b"").block("host:1")
    assert CALL.body()[:5] == b"\x00\x00\x00\x13\x88"


class Miser(threading.Thread):
    """A server that grants `grant` bytes of window at a time and fails when more come; it answers each call with its trailers alone."""

    def __init__(self, calls: int, window: int, grant: int) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.calls, self.window, self.grant = calls, window, grant
        self.bodies: dict[int, bytes] = {}
        self.overrun = False
        self.pongs: list[bytes] = []

    def run(self) -> None:
        sock, _ = self.listener.accept()
        with sock, self.listener:
            file = sock.makefile("rb")
            assert file.read(len(http2.PREFACE)) == http2.PREFACE
            sock.sendall(http2.settings({4: self.window}) + http2.frame(http2.PING, 0, 0, b"pingpong"))
            left: dict[int, int] = {}
            whole = 65_535
            ended = 0
            while ended < self.calls and (head := file.read(http2.HEAD_BYTES)):
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big")
                payload = file.read(int.from_bytes(head[:3], "big"))
                if kind == http2.SETTINGS and not flags & http2.ACK:
                    sock.sendall(http2.frame(http2.SETTINGS, http2.ACK, 0))
                elif kind == http2.PING:
                    self.pongs.append(payload)
                elif kind == http2.DATA:
                    left[stream] = left.get(stream, self.window) - len(payload)
                    whole -= len(payload)
                    self.overrun |= left[stream] < 0 or whole < 0
                    self.bodies[stream] = self.bodies.get(stream, b"") + payload
                    if flags & http2.END_STREAM:
                        ended += 1
                        trailers = hpack.field("grpc-status", str(stream % 3))
                        sock.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, b"\x88" + trailers))
                    else:
                        left[stream] += self.grant
                        sock.sendall(http2.window_update(stream, self.grant))
                    whole += len(payload)
                    sock.sendall(http2.window_update(0, len(payload)) if payload else b"")
            file.close()


@settings(max_examples=15, deadline=None)
@given(calls=st.integers(1, 6), window=st.integers(1, 6000), grant=st.integers(600, 6000))
def test_windows_are_never_overrun_and_bodies_arrive_whole(calls: int, window: int, grant: int) -> None:
    miser = Miser(calls, window, grant)
    miser.start()
    connection = GrpcConnection(socket.create_connection(miser.listener.getsockname()), CALL)
    for number in range(calls):
        connection.begin(float(number))
    finished = received(connection, calls)
    connection.close()
    miser.join()
    assert not miser.overrun
    assert miser.bodies == {2 * number + 1: CALL.body() for number in range(calls)}
    assert sorted(finished) == [(float(number), (2 * number + 1) % 3) for number in range(calls)]
    assert miser.pongs == [b"pingpong"]


def received(connection: GrpcConnection, calls: int) -> list[Finished]:
    """Let the connection work until so many calls ended."""
    connection.sock.settimeout(10)
    finished: list[Finished] = []
    give_up_s = time.monotonic() + 10
    while len(finished) < calls and time.monotonic() < give_up_s:
        finished += connection.receive()
        if connection.blocked:
            connection.flush()
    return finished


def answered(payloads: list[bytes]) -> tuple[GrpcConnection, threading.Event]:
    """Return a connection whose server says hello and, once the event is set, these bytes, whatever it is asked."""
    go = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, listener:
            sock.sendall(http2.settings({3: 2}) + http2.frame(http2.SETTINGS, http2.ACK, 0))
            go.wait(10)
            for payload in payloads:
                sock.sendall(payload)
            while sock.recv(1 << 16):
                pass

    threading.Thread(target=serve).start()
    return GrpcConnection(socket.create_connection(listener.getsockname()), GrpcRequest(method="/a.B/C", message=b"")), go


def test_a_reset_stream_and_an_end_without_status_are_told_apart() -> None:
    reset = http2.frame(http2.RST_STREAM, 0, 1, b"\0\0\0\x08")
    bare = http2.frame(http2.DATA, http2.END_STREAM, 3, b"\0\0\0\0\0")
    connection, go = answered([reset + bare + reset])
    connection.begin(1.0)
    connection.begin(2.0)
    go.set()
    assert received(connection, 2) == [(1.0, http2.RESET), (2.0, http2.NO_STATUS)]
    connection.close()


def test_padding_and_pieces_do_not_matter() -> None:
    head = http2.frame(http2.HEADERS, http2.END_HEADERS | http2.PADDED | http2.PRIORITY, 1, b"\x02\0\0\0\0\x01\x88\0\0")
    data = http2.frame(http2.DATA, http2.PADDED, 1, b"\x03\0\0\0\0\x02hi\0\0\0")
    end = http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, hpack.field("grpc-status", "0"))
    connection, go = answered([bytes([byte]) for byte in head + data + end])
    connection.begin(1.0)
    go.set()
    assert received(connection, 1) == [(1.0, 0)]
    assert connection.first_body == b"hi"
    connection.close()


def test_the_servers_limit_of_calls_and_its_goodbye_are_said() -> None:
    connection, go = answered([http2.frame(http2.GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\x0benhance your calm")])
    connection.begin(1.0)
    connection.begin(1.0)
    with pytest.raises(Closed, match="allows 2 calls"):
        connection.begin(1.0)
    go.set()
    with pytest.raises(Closed, match="error 11 enhance your calm"):
        received(connection, 1)
    connection.close()


def test_stream_ids_are_odd_and_rise() -> None:
    connection, go = answered([])
    connection.begin(0.0)
    connection.begin(0.0)
    go.set()
    assert list(connection._began) == list(itertools.islice(itertools.count(1, 2), 2))
    connection.close()
