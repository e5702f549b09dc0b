"""The servers we compare with: pinned, told apart, called in their own tongue. None is installed here."""

from __future__ import annotations

import ast
import base64
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from plait.errors import InvalidArgument
from plait_bench import peers
from plait_bench.http2 import GrpcRequest
from plait_bench.models import MLP
from plait_bench.peers import PEERS, chosen
from plait_bench.processes import wait_for_port


def test_peers_are_chosen_by_name() -> None:
    assert [p.name for p in chosen("mosec, kserve,mosec")] == ["mosec", "kserve"]
    assert [p.name for p in chosen("all")] == ["mosec", "kserve", "mlserver", "litserve"]
    assert chosen("none") == chosen("") == []
    with pytest.raises(InvalidArgument, match="no peer 'triton'") as caught:
        chosen("mosec,triton")
    assert caught.value.reason == "BENCH_PEER_UNKNOWN"


@pytest.mark.parametrize("name", list(PEERS))
def test_each_is_pinned_and_its_server_is_there(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]
    assert all("==" in package for package in (*peer.packages, peers.TORCH))
    assert peer.environment.folder(tmp_path).parent == tmp_path / "bench-peers"
    scripts = [part for part in peer.argv(Path("/env/bin/python"), 1, tmp_path) if part.endswith(".py")]
    for script in scripts or [str(Path(peers.__file__).parent / "peer_servers" / "mlserver_runtime.py")]:
        imported = {n.module for n in ast.walk(ast.parse(Path(script).read_text())) if isinstance(n, ast.ImportFrom)}
        assert not {module for module in imported if module and module.startswith("plait")}


@pytest.mark.parametrize("name", list(PEERS))
def test_a_request_is_what_its_server_takes(name: str) -> None:
    rows = MLP.rows(3)
    target = PEERS[name].request(rows)(4711)
    assert target.port == 4711
    if isinstance(target.request, GrpcRequest):
        assert rows.tobytes() in target.request.message
        return
    head, _, body = target.request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert rows.tobytes() in (body, base64.b64decode(json.loads(body)["rows"]) if body.startswith(b"{") else body)


def test_answers_are_read_in_each_tongue() -> None:
    scores = np.array([1.5, -2], np.float32)
    assert PEERS["mosec"].scores(scores.tobytes()).tolist() == [1.5, -2]
    body = json.dumps({"scores": base64.b64encode(scores.tobytes()).decode()}).encode()
    assert PEERS["litserve"].scores(body).tolist() == [1.5, -2]


def test_mlserver_is_told_by_files(tmp_path: Path) -> None:
    PEERS["mlserver"].prepare(tmp_path, 4711, {"BENCH_MAX_BATCH": "16", "BENCH_WAIT_MS": "1"})
    assert json.loads((tmp_path / "settings.json").read_text())["grpc_port"] == 4711
    model = json.loads((tmp_path / "model-settings.json").read_text())
    assert (model["max_batch_size"], model["max_batch_time"]) == (16, 0.001)
    PEERS["mlserver"].prepare(tmp_path, 4711, {})
    assert "max_batch_size" not in json.loads((tmp_path / "model-settings.json").read_text())


def test_a_peer_gets_its_settings_and_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_MODEL_WORKER_RPC__PORT", "1")
    code = (
        "import os, socket, time; print({k: v for k, v in os.environ.items() if k[:5] in ('BENCH', 'PLAIT')}, flush=True)\n"
        "with socket.create_server(('127.0.0.1', int(os.environ['BENCH_PORT']))): time.sleep(600)"
    )
    peer = peers.Peer(
        name="small",
        packages=(),
        protocol="none",
        settings={},
        argv=lambda python, _port, _folder: [str(python), "-c", code],
        request=PEERS["mosec"].request,
        scores=PEERS["mosec"].scores,
    )
    server, port = peer.start(
        Path(sys.executable), tmp_path / "run", tmp_path / "m.pt", MLP, {"BENCH_MAX_BATCH": "8"}, min(os.sched_getaffinity(0))
    )
    with server:
        wait_for_port(server, port, 30)
    said = (tmp_path / "run" / "server.log").read_text()
    assert "'BENCH_MAX_BATCH': '8'" in said
    assert "'BENCH_WIDTH': '80'" in said
    assert "PLAIT_" not in said
