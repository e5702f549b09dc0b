"""Three real workers under load, of which one is killed, and which are then restarted one after the other: no call may fail."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.fakes.registry_world import eventually
from tests.fakes.worker_process import WorkerProcess, worker_process
from tests.fakes.worker_world import SERVICE_TOKEN, infer_request, model, outputs, publish_ranker, snapshot

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.connections import CallPlan
from router.pools import Pools
from router.settings import WorkersSettings

CALLERS = 16
USER = np.array([[1, 2, 3]], np.float32)
ITEMS = np.arange(12, dtype=np.float32).reshape(4, 3)
EXPECTED = [8.0, 26.0, 44.0, 62.0]


@pytest.fixture
def no_postgres() -> Iterator[str]:
    """A DSN where connections are refused: the port is taken, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"postgresql://nobody@127.0.0.1:{taken.getsockname()[1]}/nothing"


class Load:
    """Callers that ask again as soon as they are answered."""

    def __init__(self, pools: Pools) -> None:
        self.answered = 0
        self._pools = pools

    async def __call__(self) -> None:
        """Call for ever; raises what a call does."""
        while True:
            frame = pb.StreamInferRequest()
            frame.request.CopyFrom(infer_request("ranker", {"user": USER, "item": ITEMS}, version="1"))
            plan = CallPlan(model="ranker", version="1", rows=4, deadline=Deadline.after(30), tenant="shop", request_id="r")
            answer = await self._pools.infer(frame, plan)
            assert outputs(answer)["score"] == EXPECTED
            self.answered += 1

    async def more(self, calls: int = 400) -> None:
        """Return once so many more were answered."""
        wanted = self.answered + calls
        await eventually(lambda: self.answered >= wanted, 60)


@asynccontextmanager
async def loaded(addresses: list[str]) -> AsyncIterator[tuple[Pools, Load]]:
    channel = ChannelSettings(service_token=SERVICE_TOKEN)  # type: ignore[arg-type]
    pools = Pools(WorkersSettings(addresses=",".join(addresses), slow_start_s=1.0), channel)
    load = Load(pools)
    tasks = [asyncio.create_task(pools.run()), *(asyncio.create_task(load()) for _ in range(CALLERS))]
    try:
        yield pools, load
        assert not [task for task in tasks if task.done()], [task.exception() for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pools.close()


async def test_killing_and_restarting_workers_under_load_fails_no_call(tmp_path: Path, no_postgres: str) -> None:
    registry = snapshot(model("ranker", publish_ranker(tmp_path / "artifact")))

    async def start(stack: AsyncExitStack, number: int, port: int = 0) -> WorkerProcess:
        return await stack.enter_async_context(worker_process(tmp_path / f"w{number}", registry, no_postgres, port=port))

    async with AsyncExitStack() as stack:
        workers = [await start(stack, number) for number in range(3)]
        addresses = [worker.address for worker in workers]
        await _all_hold(addresses)
        async with loaded(addresses) as (pools, load):
            await load.more()
            os.kill(workers[0].child.pid, signal.SIGKILL)
            await workers[0].child.wait()
            await load.more()
            assert f"{addresses[0]} in_flight=0 failing" in repr(pools)
            for number in range(3):
                if number:
                    os.kill(workers[number].child.pid, signal.SIGTERM)
                    assert await workers[number].child.wait() == 0, workers[number].child.log_tail()
                workers[number] = await start(stack, number, int(addresses[number].rpartition(":")[2]))
                await _all_hold([addresses[number]])
                await eventually(lambda: "failing" not in repr(pools), 30)
                await load.more()


async def _all_hold(addresses: list[str]) -> None:
    """Return once each of these workers has the model ready."""
    channel = ChannelSettings(service_token=SERVICE_TOKEN)  # type: ignore[arg-type]
    for address in addresses:
        pools = Pools(WorkersSettings(addresses=address), channel)
        try:
            [endpoint] = pools._default.connections._by_address.values()
            async with asyncio.timeout(60):
                while ("ranker", "1") not in (await endpoint.transport.ready_versions(Deadline.after(5)) or ()):
                    await asyncio.sleep(0.05)
        finally:
            await pools.close()
