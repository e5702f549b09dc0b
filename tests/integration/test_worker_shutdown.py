"""SIGTERM to a real worker process under load: what it has taken it answers, what comes later it refuses, and then it ends in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tests.fakes.worker_process import worker_process
from tests.fakes.worker_world import TOKEN, infer_request, model, outputs, published, scripted, snapshot
from torch import Tensor, nn

from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.errors import ResourceExhausted, from_rpc_error
from plait.local.child import Child
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, Execution, ModelVersion, TensorSpec
from plait.rpc.channel import open_channel
from plait.settings import ChannelSettings

CALLERS = 6
ROUNDS = 300.0  # work that keeps a call long enough for all the callers' first ones to be in the worker together
GRACE_S = 60


class Worker(nn.Module):
    """y = 2 · x, after x rounds of work."""

    def forward(self, x: Tensor) -> Tensor:
        busy = torch.ones(1 << 20)
        for _ in range(int(x.max())):
            busy = torch.tanh(busy)
        return x * 2 + busy.sum() * 0


@dataclass
class Process:
    """A worker process, and a stub to speak to it."""

    child: Child
    stub: Any

    async def infer(self, x: float) -> float:
        """Return the model's answer to one number."""
        request = infer_request("worker", {"x": np.array([[x]], np.float32)})
        [[y]] = outputs(await self.stub.ModelInfer(request, metadata=TOKEN, timeout=GRACE_S))["y"]
        return float(y)

    async def ready(self) -> bool:
        """Say whether the model can be called. Raises what the call does."""
        return bool((await self.stub.ModelReady(pb.ModelReadyRequest(name="worker"), metadata=TOKEN, timeout=GRACE_S)).ready)


@pytest.fixture
def no_postgres() -> Iterator[str]:
    """A DSN where connections are refused: the port is taken, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"postgresql://nobody@127.0.0.1:{taken.getsockname()[1]}/nothing"


@pytest.fixture(params=[Execution(), Execution(kind="process", instances=2)], ids=["thread", "processes"])
def execution(request: pytest.FixtureRequest) -> Execution:
    found: Execution = request.param
    return found


@pytest.fixture
def version(execution: Execution, tmp_path: Path) -> ModelVersion:
    folder = tmp_path / "artifact"
    folder.mkdir()
    scripted(Worker()).save(str(folder / "model.pt"))
    x, y = (TensorSpec(name=name, dtype="float32", shape=(-1, 1)) for name in "xy")
    return published(
        folder,
        ArtifactManifest(
            name="worker",
            format="torchscript",
            entry="model.pt",
            inputs=(x,),
            outputs=(y,),
            batching=Batching(max_rows=1),
            execution=execution,
        ),
    )


@asynccontextmanager
async def started(version: ModelVersion, folder: Path, dsn: str) -> AsyncIterator[Process]:
    """Start a worker; it is ready, and gone afterwards."""
    registry = snapshot(model("worker", version))
    limits = {"RPC__GRACE_S": str(GRACE_S), "RPC__MAX_IN_FLIGHT": str(CALLERS)}
    async with worker_process(folder, registry, dsn, **limits) as worker, open_channel(worker.address, ChannelSettings()) as channel:
        process = Process(worker.child, pb_grpc.GRPCInferenceServiceStub(channel))
        async with asyncio.timeout(60):
            while not await process.ready():
                assert process.child.running, process.child.log_tail()
        yield process


def children(pid: int) -> set[Path]:
    """Return the folders in /proc of what a process has started and not reaped; nothing where there is no /proc."""
    return {Path("/proc", child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}


async def full(process: Process) -> None:
    """Return once the worker has taken one call of each caller: it then has no place left, not even for a question."""

    async def ask() -> None:
        while True:
            await process.ready()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(ask(), 60)
    assert isinstance(from_rpc_error(caught.value), ResourceExhausted), caught.value


async def test_what_was_taken_is_answered_and_what_comes_later_is_refused(
    execution: Execution, version: ModelVersion, tmp_path: Path, no_postgres: str
) -> None:
    async with started(version, tmp_path, no_postgres) as process:
        told = asyncio.Event()

        async def caller(number: int) -> grpc.StatusCode:
            assert await process.infer(ROUNDS + number) == 2 * (ROUNDS + number)
            await told.wait()
            while True:
                try:
                    assert await process.infer(number) == 2 * number
                except grpc.aio.AioRpcError as error:
                    return error.code()

        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(caller(number)) for number in range(CALLERS)]
            await full(process)
            assert not any(task.done() for task in callers)
            instances = children(process.child.pid)
            assert sys.platform != "linux" or execution.kind == "thread" or len(instances) >= execution.instances
            os.kill(process.child.pid, signal.SIGTERM)
            told.set()
        assert {task.result() for task in callers} == {grpc.StatusCode.UNAVAILABLE}
        async with asyncio.timeout(GRACE_S):
            assert await process.child.wait() == 0, process.child.log_tail()
        assert not [instance for instance in instances if instance.exists()]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.infer(0)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
