"""A worker on a GPU, over its real protocol: what was asked for too much is refused, and the process serves on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tests.fakes.gpu import needs_gpu
from tests.fakes.worker_world import infer_request, model, outputs, published, scripted, snapshot, worker_world
from torch import Tensor, nn

from plait.errors import from_rpc_error
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, Execution, ModelVersion, TensorSpec

pytestmark = needs_gpu

_MIB_A_ROW = 256


class Greedy(nn.Module):
    """y = 2 · x, and takes 256 MiB of the device's memory a row."""

    def forward(self, x: Tensor) -> Tensor:
        wasted = torch.zeros([x.size(0), 64, 1024, 1024], device=x.device)
        return x * 2 + wasted[:, 0, 0, 0].unsqueeze(1)


def publish_greedy(folder: Path, execution: Execution, **batching: Any) -> ModelVersion:
    folder.mkdir(parents=True)
    scripted(Greedy()).save(str(folder / "model.pt"))
    np.savez(folder / "self_test.npz", **{"input.x": np.ones((1, 2), np.float32), "output.y": np.full((1, 2), 2, np.float32)})
    tensors = [TensorSpec(name=name, dtype="float32", shape=(-1, 2)) for name in "xy"]
    manifest = ArtifactManifest(
        name="greedy",
        format="torchscript",
        entry="model.pt",
        inputs=(tensors[0],),
        outputs=(tensors[1],),
        execution=execution,
        batching=Batching(**batching),
    )
    return published(folder, manifest)


def too_many() -> int:
    """Rows that need half as much again as the GPU has."""
    return int(torch.cuda.mem_get_info(0)[1] * 1.5) // (_MIB_A_ROW << 20)


@pytest.mark.parametrize("execution", [Execution(instances=2), Execution(kind="process")], ids=["threads", "process"])
async def test_a_batch_too_large_for_the_device_is_resource_exhausted_and_the_worker_serves_on(
    tmp_path: Path, execution: Execution
) -> None:
    version = publish_greedy(tmp_path / "m", execution, max_rows=4096)
    async with worker_world(snapshot(model("greedy", version)), models={"device": "cuda"}) as w:
        assert w.states() == {"greedy/1": "READY"}
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await w.infer(infer_request("greedy", {"x": np.ones((too_many(), 2), np.float32)}), timeout_s=60)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            error = from_rpc_error(refused.value)
            assert (error.reason, error.retry_after_s) == ("OUT_OF_DEVICE_MEMORY", 1.0)
            answer = await w.infer(infer_request("greedy", {"x": np.full((1, 2), 3, np.float32)}))
            assert outputs(answer) == {"y": [[6, 6]]}


async def test_requests_that_only_together_are_too_large_are_all_answered(tmp_path: Path) -> None:
    version = publish_greedy(tmp_path / "m", Execution(), max_rows=4096)
    async with worker_world(snapshot(model("greedy", version)), models={"device": "cuda"}) as w:
        rows = too_many() // 3
        requests = [infer_request("greedy", {"x": np.full((rows, 2), k, np.float32)}) for k in range(4)]
        answers = await asyncio.gather(*(w.infer(request, timeout_s=60) for request in requests))
        assert [outputs(answer)["y"][0] for answer in answers] == [[2 * k, 2 * k] for k in range(4)]


async def test_a_model_whose_buckets_do_not_fit_the_device_is_not_served(tmp_path: Path) -> None:
    version = publish_greedy(tmp_path / "m", Execution(), max_rows=4096, buckets=(4, too_many()))
    async with worker_world(snapshot(model("greedy", version)), models={"device": "cuda"}) as w:
        assert w.states() == {"greedy/1": "FAILED"}
        [(_, entry)] = w.models.entries()
        assert entry.error is not None
        assert entry.error.reason == "OUT_OF_DEVICE_MEMORY"
