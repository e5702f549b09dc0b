"""A model-worker with a known capacity and nothing to compute: it waits as long as a batch would take, so that what is in front of it is measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as pb_grpc
from plait.rpc import multiplex
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings

_SERVICE = pb.DESCRIPTOR.services_by_name["ModelWorkerService"].full_name


class BatchingWorker(pb_grpc.ModelWorkerServiceServicer):
    """Answers zeros, `batch` requests at a time, after `fixed_s` and `each_s` for each of them."""

    def __init__(self, fixed_s: float, each_s: float, batch: int) -> None:
        self._fixed_s, self._each_s, self._batch = fixed_s, each_s, batch
        self._waiting: deque[tuple[asyncio.Future[tuple[float, float, int]], float]] = deque()
        self._came = asyncio.Event()

    async def StreamInfer(self, requests: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Answer the calls of a stream."""
        await multiplex.serve(requests, context, self._fill, pb.StreamInferResponse)

    async def run(self) -> None:
        """Serve batches, for ever."""
        while True:
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            batch = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            began_s = time.perf_counter()
            await asyncio.sleep(self._fixed_s + self._each_s * len(batch))
            took_s = time.perf_counter() - began_s
            for turn, came_s in batch:
                if not turn.done():
                    turn.set_result((began_s - came_s, took_s, len(batch)))

    async def _fill(self, request: Any, response: Any) -> None:
        turn: asyncio.Future[tuple[float, float, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, time.perf_counter()))
        self._came.set()
        rows = request.inputs[0].shape[0]
        queue_s, compute_s, batched = await turn
        response.model_name, response.model_version, response.id = request.model_name, request.model_version, request.id
        response.outputs.add(name="score", datatype="FP32", shape=[rows])
        response.raw_output_contents.append(bytes(4 * rows))
        response.parameters["queue_us"].int64_param = int(queue_s * 1e6)
        response.parameters["compute_us"].int64_param = int(compute_s * 1e6)
        response.parameters["batch_rows"].int64_param = batched * rows


async def _serve(arguments: argparse.Namespace) -> None:
    worker = BatchingWorker(arguments.fixed_ms / 1e3, arguments.each_ms / 1e3, arguments.batch)
    server = RpcServer(
        RpcSettings(grace_s=0), authenticator=Authenticator(lambda _: None, service_token=os.environ["BATCHING_WORKER_TOKEN"])
    )
    server.add(pb_grpc.add_ModelWorkerServiceServicer_to_server, worker, _SERVICE, scope="infer")
    await server.start()
    part = arguments.port_file.with_suffix(".part")
    part.write_text(json.dumps({"rpc": server.address}))
    part.rename(arguments.port_file)
    await worker.run()


def main() -> None:
    """Run until killed."""
    parser = argparse.ArgumentParser()
    for name in ("fixed_ms", "each_ms"):
        parser.add_argument(name, type=float)
    parser.add_argument("batch", type=int)
    parser.add_argument("port_file", type=Path)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
