"""What the model-worker adds to a forward pass, and what batching costs against one static batch. Run: python tests/bench/bench_worker.py"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.fakes.worker_world import WorkerWorld, infer_request, model, published, scripted, snapshot, worker_world

from plait.api.inference.v2 import inference_pb2 as pb
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, ModelVersion, TensorSpec
from plait.settings import TelemetrySettings
from plait.telemetry import logging

CALLS = 1000


class Ranker(nn.Module):
    """user [requests, 16] and item [rows, 64] through 80-256-128-1."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(16, 256), nn.Linear(64, 256, bias=False)
        self.top = nn.Sequential(nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, user: Tensor, item: Tensor, row_splits: Tensor) -> Tensor:
        users = self.user(user)
        if user.shape[0] != 1:
            users = users.repeat_interleave(row_splits[1:] - row_splits[:-1], dim=0)
        return self.top(users + self.item(item)).squeeze(1)


def publish(folder: Path) -> ModelVersion:
    folder.mkdir()
    scripted(Ranker()).save(str(folder / "model.pt"))
    inputs = (
        TensorSpec(name="user", dtype="float32", shape=(1, 16), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, 64)),
    )
    outputs = (TensorSpec(name="score", dtype="float32", shape=(-1,)),)
    batching = Batching(row_splits="row_splits")
    return published(
        folder, ArtifactManifest(name="m", format="torchscript", entry="model.pt", inputs=inputs, outputs=outputs, batching=batching)
    )


def p50_us(run: Callable[[], Any], calls: int = CALLS) -> float:
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def request(rows: int) -> Any:
    return infer_request("ranker", {"user": np.ones((1, 16), np.float32), "item": np.ones((rows, 64), np.float32)})


async def alone(w: WorkerWorld, call: Any, rows: int) -> tuple[float, float]:
    """Return p50 of the caller's latency and of the time in the model, microseconds."""
    message = request(rows)
    took, compute = [], []
    for _ in range(CALLS):
        began = time.perf_counter()
        answer = await call(message)
        took.append(time.perf_counter() - began)
        compute.append(answer.parameters["compute_us"].int64_param)
    return statistics.median(took[100:]) * 1e6, statistics.median(compute[100:])


async def inside(w: WorkerWorld, rows: int) -> float:
    """Return p50 of the batcher alone, microseconds: what is left without the wire."""
    served = w.models.get("ranker")
    inputs = served.codec.decode(request(rows)).inputs
    took = []
    for _ in range(CALLS):
        began = time.perf_counter()
        await served.batcher.submit(inputs, rows, began + 1e9)
        took.append(time.perf_counter() - began)
    return statistics.median(took[100:]) * 1e6


async def together(w: WorkerWorld, callers: int = 64, rounds: int = 200) -> float:
    """Return rows per second of callers of one row each, through the batcher and without the wire."""
    served = w.models.get("ranker")
    inputs = served.codec.decode(request(1)).inputs

    async def caller() -> None:
        for _ in range(rounds):
            await served.batcher.submit(inputs, 1, time.monotonic() + 60)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return callers * rounds / (time.perf_counter() - began)


async def over_the_wire(w: WorkerWorld, callers: int = 64, rounds: int = 100) -> float:
    """As `together`, each caller over StreamInfer (client and server share this process)."""
    message = request(1)

    async def caller() -> None:
        for _ in range(rounds):
            await w.stream(message, timeout_s=60)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return callers * rounds / (time.perf_counter() - began)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        version = publish(Path(folder) / "m")
        async with worker_world(snapshot(model("ranker", version))) as w:
            torch.set_num_threads(1)
            loaded: Any = torch.jit.load(str(Path(folder) / "m" / "model.pt")).eval()
            with torch.inference_mode():
                user, item, splits = torch.ones(1, 16), torch.ones(500, 64), torch.tensor([0, 500])
                forward_us = p50_us(lambda: loaded(user, item, splits))
                users, rows, all_splits = torch.ones(64, 16), torch.ones(64, 64), torch.arange(65)
                batch_us = p50_us(lambda: loaded(users, rows, all_splits))
            served = w.models.get("ranker")
            message = request(500)
            decode_us = p50_us(lambda: served.codec.decode(message))
            query = served.codec.decode(message)
            scores = (np.ones(500, np.float32),)
            encode_us = p50_us(lambda: served.codec.encode(query, scores, pb.ModelInferResponse()))
            lines = [
                f"500 x 64: forward pass {forward_us:.0f} us, decode {decode_us:.0f}, encode {encode_us:.0f}, batcher alone {await inside(w, 500):.0f}"
            ]
            for name, call in (("StreamInfer", w.stream), ("ModelInfer", w.infer)):
                took_us, compute_us = await alone(w, call, 500)
                lines.append(f"{name}: p50 {took_us:.0f} us, of which in the model {compute_us:.0f}")
            static = 64 / batch_us * 1e6
            dynamic, wired = await together(w), await over_the_wire(w)
            lines.append(
                f"64 x 1 row: static {static:.0f} rows/s, 64 callers {dynamic:.0f} ({dynamic / static:.2f}), over a stream {wired:.0f}"
            )
            sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    logging.configure(TelemetrySettings(log_level="error"), "bench")
    uvloop.run(main())
