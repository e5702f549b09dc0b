"""The servers that show the generator's limit answer every request, in whatever pieces it comes."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait_bench import http1, http2
from plait_bench.ceiling import GrpcAnswers, HttpAnswers
from plait_bench.http2 import GrpcRequest
from plait_bench.load import Target, closed_loop
from plait_bench.processes import ServerProcess, free_port, wait_for_port

REQUESTS: dict[str, bytes | GrpcRequest] = {
    "http": http1.build_request("/x", b"q" * 3000),
    "grpc": GrpcRequest(method="/a.B/C", message=b"q" * 40_000),
}


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, *(cut % len(data) for cut in cuts), len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(count=st.integers(1, 3), cuts=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_http_requests_are_answered_in_any_pieces(count: int, cuts: list[int]) -> None:
    answers = HttpAnswers(b"answer")
    out = b"".join(answers.take(piece) for piece in pieces(http1.build_request("/x", b"q" * 300) * count, cuts))
    assert out.count(b"answer") == count == out.count(b"HTTP/1.1 200")


@given(count=st.integers(1, 3), cuts=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_grpc_calls_are_answered_in_any_pieces(count: int, cuts: list[int]) -> None:
    request = GrpcRequest(method="/a.B/C", message=b"q" * 300)
    template = http2.Template(request.block("h"), request.body(), 100)
    sent = http2.PREFACE + http2.settings({}) + b"".join(bytes(template.addressed(2 * number + 1)) for number in range(count))
    answers = GrpcAnswers(b"answer")
    out = b"".join(answers.take(piece) for piece in pieces(sent, cuts))
    assert out.count(b"answer") == count == out.count(b"grpc-status")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_process_serves_the_generator(kind: str, tmp_path: Path) -> None:
    port = free_port()
    argv = [sys.executable, "-m", "plait_bench.ceiling", kind, str(port), "100"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with ServerProcess("ceiling", argv, core=min(os.sched_getaffinity(0)), log=tmp_path / "log", env=env) as server:
        wait_for_port(server, port, 30)
        target = Target(port=port, request=REQUESTS[kind])
        tally = closed_loop(target, callers=4, seconds=0.2, server_cpu_s=server.cpu_s)
    assert set(tally.statuses) == {target.ok}
    assert len(tally.taken_s) > 4
    assert all(body == bytes(100) for body in tally.first_bodies)
