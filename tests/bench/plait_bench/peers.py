"""The servers we compare with: how each is installed on its own, started in the way its documentation recommends, and called.

Each gets several settings and keeps the one that serves it best, measured in the same run. What runs in their environments is in
`peer_servers` and imports nothing of ours.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from plait.errors import InvalidArgument
from plait_bench import http1
from plait_bench.environments import Environment, foreign_environ
from plait_bench.inference import infer_call, scores_of
from plait_bench.load import Target
from plait_bench.models import Network, Rows
from plait_bench.processes import ServerProcess, free_port

TORCH: Final = "torch==2.13.0"  # exactly so: any other spelling may bring gigabytes of CUDA
_NUMPY: Final = "numpy==2.4.6"
_SERVERS: Final = Path(__file__).parent / "peer_servers"
_START_S: Final = 120.0
Settings = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One other server. `settings`: what is tried, by name; `packages` are pinned; `protocol` says how it is called."""

    name: str
    packages: tuple[str, ...]
    protocol: str
    settings: Mapping[str, Settings]
    argv: Callable[[Path, int, Path], list[str]]
    request: Callable[[Rows], Callable[[int], Target]]
    scores: Callable[[bytes], Rows]
    prepare: Callable[[Path, int, Settings], None] = lambda _folder, _port, _settings: None

    @property
    def environment(self) -> Environment:
        """What is installed for it."""
        return Environment(
            name=self.name, steps=((f"{TORCH} (about 1 GB, once)", (TORCH, _NUMPY)), (" ".join(self.packages), self.packages))
        )

    def start(self, python: Path, folder: Path, model: Path, network: Network, settings: Settings, core: int) -> tuple[ServerProcess, int]:
        """Start it on its core; return it and its port. It may not answer yet."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.prepare(folder, port, settings)
        env = foreign_environ(python) | {
            "BENCH_MODEL": str(model),
            "BENCH_WIDTH": str(network.width),
            "BENCH_PORT": str(port),
            "BENCH_HTTP_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(_SERVERS),
            **settings,
        }
        argv = self.argv(python, port, folder)
        return ServerProcess(self.name, argv, core=core, log=folder / "server.log", env=env, cwd=folder), port


def _script(name: str) -> Callable[[Path, int, Path], list[str]]:
    return lambda python, _port, _folder: [str(python), str(_SERVERS / name)]


def _mosec(python: Path, port: int, _folder: Path) -> list[str]:
    return [str(python), str(_SERVERS / "mosec_server.py"), "--port", str(port), "--address", "127.0.0.1", "--log-level", "error"]


def _mlserver(python: Path, _port: int, folder: Path) -> list[str]:
    return [str(python.parent / "mlserver"), "start", str(folder)]


def _mlserver_files(folder: Path, port: int, settings: Settings) -> None:
    """No pool of inference processes: with one core it only adds hops."""
    server = {
        "grpc_port": port, "http_port": free_port(), "metrics_port": free_port(), "host": "127.0.0.1", "parallel_workers": 0, "debug": False
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server), encoding="utf-8")
    model: dict[str, object] = {"name": "mlp", "implementation": "mlserver_runtime.Scores"}
    if "BENCH_MAX_BATCH" in settings:
        model |= {"max_batch_size": int(settings["BENCH_MAX_BATCH"]), "max_batch_time": float(settings["BENCH_WAIT_MS"]) / 1e3}
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")


def _grpc(rows: Rows) -> Callable[[int], Target]:
    call = infer_call("mlp", rows)
    return lambda port: Target(port=port, request=call)


def _raw_http(rows: Rows) -> Callable[[int], Target]:
    request = http1.build_request("/inference", rows.tobytes())
    return lambda port: Target(port=port, request=request)


def _json_http(rows: Rows) -> Callable[[int], Target]:
    body = json.dumps({"rows": base64.b64encode(rows.tobytes()).decode()}).encode()
    request = http1.build_request("/predict", body, content_type="application/json")
    return lambda port: Target(port=port, request=request)


def _raw_scores(body: bytes) -> Rows:
    return np.frombuffer(body, np.float32)


def _json_scores(body: bytes) -> Rows:
    return np.frombuffer(base64.b64decode(json.loads(body)["scores"]), np.float32)


def _batching(*tried: tuple[int, int], **more: str) -> dict[str, Settings]:
    return {
        f"batches of {most}, wait {wait} ms" if most > 1 else "no batching": {
            "BENCH_MAX_BATCH": str(most), "BENCH_WAIT_MS": str(wait), **more
        } for most, wait in tried
    }  # fmt: skip


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer(
            name="mosec",
            packages=("mosec==0.9.8",),
            protocol="HTTP/1.1, raw bytes",
            settings=_batching((1, 0), (8, 1), (16, 1)),
            argv=_mosec,
            request=_raw_http,
            scores=_raw_scores,
        ),
        Peer(
            name="kserve",
            packages=("kserve==0.21.0",),
            protocol="gRPC, Open Inference Protocol, raw tensors",
            settings={"as documented": {}},  # its batcher is a proxy of its own (the agent), which one core would have to carry too
            argv=_script("kserve_server.py"),
            request=_grpc,
            scores=scores_of,
        ),
        Peer(
            name="mlserver",
            packages=("mlserver==1.7.1",),
            protocol="gRPC, Open Inference Protocol, raw tensors",
            settings={"no batching": {}, **_batching((16, 1))},
            argv=_mlserver,
            prepare=_mlserver_files,
            request=_grpc,
            scores=scores_of,
        ),
        Peer(
            name="litserve",
            packages=("litserve==0.2.19",),
            protocol="HTTP/1.1, base64 in JSON",
            settings=_batching((1, 0), (16, 1), BENCH_FAST_QUEUE="0") | {
                "batches of 16, wait 1 ms, fast queue": {"BENCH_MAX_BATCH": "16", "BENCH_WAIT_MS": "1", "BENCH_FAST_QUEUE": "1"}
            },
            argv=_script("litserve_server.py"),
            request=_json_http,
            scores=_json_scores,
        ),
    )
}  # fmt: skip


def chosen(names: str) -> list[Peer]:
    """Return the peers in a comma-separated list; "none" and "" mean none, "all" all. Raises InvalidArgument (BENCH_PEER_UNKNOWN)."""
    wanted = [name.strip() for name in names.split(",") if name.strip() and name.strip() != "none"]
    if wanted == ["all"]:
        return list(PEERS.values())
    for name in wanted:
        if name not in PEERS:
            raise InvalidArgument(f"there is no peer {name!r}; there is: {', '.join(PEERS)}, all, none", reason="BENCH_PEER_UNKNOWN")
    return [PEERS[name] for name in dict.fromkeys(wanted)]
