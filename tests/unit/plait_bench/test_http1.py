"""HTTP/1.1 of the load generator: what it sends, and answers in pieces of any size."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait_bench import http1
from plait_bench.connection import Closed


def plain(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} What\r\nServer: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunked(parts: list[bytes]) -> bytes:
    body = b"".join(f"{len(part):x};x=y\r\n".encode() + part + b"\r\n" for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


@given(status=st.sampled_from([200, 429, 503]), body=st.binary(max_size=200), cut=st.integers(0, 300), more=st.binary(max_size=9))
def test_an_answer_is_whole_or_not_yet(status: int, body: bytes, cut: int, more: bytes) -> None:
    answer = plain(status, body)
    found = http1.parse_answer(answer + more)
    assert found is not None
    assert (found[0], answer[found[1] :], found[2]) == (status, body, len(answer))
    if cut < len(answer):
        assert http1.parse_answer(answer[:cut]) is None


@given(parts=st.lists(st.binary(min_size=1, max_size=40), max_size=4), cut=st.integers(0, 300))
def test_chunks_end_where_they_say(parts: list[bytes], cut: int) -> None:
    answer = chunked(parts)
    found = http1.parse_answer(answer + b"HTTP/1.1 ")
    assert found is not None
    assert found[::2] == (200, len(answer))
    if cut < len(answer):
        assert http1.parse_answer(answer[:cut]) is None


def test_an_answer_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        http1.parse_answer(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n")


def test_one_call_after_the_other_whatever_the_pieces() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with theirs:
        connection = http1.Http1Connection.__new__(http1.Http1Connection)
        ours.setblocking(False)
        connection.sock, connection.first_body = ours, None
        connection._unsent, connection._request, connection._data = bytearray(), b"question", bytearray()
        for number, status in enumerate((200, 500)):
            connection.begin(float(number))
            assert theirs.recv(99) == b"question"
            answer = plain(status, b"answer")
            theirs.sendall(answer[:50])
            assert connection.receive() == []
            theirs.sendall(answer[50:])
            assert connection.receive() == [(float(number), status)]
        assert connection.receive() == []
        assert connection.first_body == b"answer"
    with pytest.raises(Closed):
        connection.receive()
    connection.close()


def test_a_real_server_understands_the_request() -> None:
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.headers["content-type"], self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with socket.create_connection(server.server_address[:2]) as sock:  # type: ignore[arg-type]
            sock.sendall(http1.build_request("/inference", b"\x00\r\n\r\n"))
            assert sock.recv(99).startswith(b"HTTP/1.0 200")
        thread.join()
    assert seen == [("/inference", "application/octet-stream", b"\x00\r\n\r\n")]
