"""Our side: one real `python -m model_worker` process, started from a last-known-good file, so that no Postgres runs beside what is measured."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc

from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.registry import last_known_good
from plait.registry.records import Model, Snapshot
from plait_bench.inference import infer_call
from plait_bench.load import Target
from plait_bench.models import Rows
from plait_bench.processes import ServerProcess

_PREFIX: Final = "PLAIT_MODEL_WORKER_"
_NO_POSTGRES: Final = "postgresql://nobody@127.0.0.1:1/nothing"  # refused at once: the worker then starts from its file


class OwnWorker(ServerProcess):
    """A model-worker that serves `models`; `settings` are added by name without prefix, for example BATCHING__MAX_ROWS."""

    def __init__(
        self, models: Sequence[Model], folder: Path, *, core: int, settings: Mapping[str, str] | None = None, name: str = "plait"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port_file = folder / "port.json"
        self._port_file.unlink(missing_ok=True)
        self._models = [model.name for model in models]
        self.token = secrets.token_hex(16)
        self.port = 0
        last_known_good.write(folder / "registry.json", Snapshot(revision=1, models={model.name: model for model in models}))
        values = {
            "RPC__PORT_FILE": str(self._port_file),
            "RPC__SERVICE_TOKEN": self.token,
            "REGISTRY__DSN": _NO_POSTGRES,
            "REGISTRY__LAST_KNOWN_GOOD": str(folder / "registry.json"),
            "TELEMETRY__LOG_LEVEL": "warning",
            **(settings or {}),
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)} | {_PREFIX + k: v for k, v in values.items()}
        super().__init__(name, [sys.executable, "-m", "model_worker"], core=core, log=folder / "worker.log", env=env)

    def wait(self, timeout_s: float = 120.0) -> None:
        """Return once every model is ready. Raises Unavailable (BENCH_SERVER_FAILED)."""
        give_up_s = time.monotonic() + timeout_s
        while not self._port_file.exists():
            self._pause(give_up_s)
        address = json.loads(self._port_file.read_text(encoding="utf-8"))["rpc"]
        self.port = int(address.rpartition(":")[2])
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            for model in self._models:
                while not self._is_ready(stub, model):
                    self._pause(give_up_s)

    def target(self, model: str, rows: Rows, *, timeout_ms: int = 0) -> Target:
        """Return what the load generator needs to call `model` with `rows`."""
        return Target(port=self.port, request=infer_call(model, rows, token=self.token, timeout_ms=timeout_ms))

    def _is_ready(self, stub: pb_grpc.GRPCInferenceServiceStub, model: str) -> bool:
        try:
            answer = stub.ModelReady(pb.ModelReadyRequest(name=model), metadata=(("x-plait-service-token", self.token),), timeout=10)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    def _pause(self, give_up_s: float) -> None:
        self.check()
        if time.monotonic() > give_up_s:
            raise self.failed("was not ready in time")
        time.sleep(0.05)


def onnx_missing() -> str:
    """Return why ONNX cannot be measured here, empty where it can."""
    if importlib.util.find_spec("model_worker.backends.onnx") is None:
        return "this model-worker has no ONNX backend"
    if importlib.util.find_spec("onnx") is None:
        return "the package onnx is not installed, so no artifact can be made"
    return ""
