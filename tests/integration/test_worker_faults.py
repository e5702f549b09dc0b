"""A model that hangs, and one whose processes are killed: who is told what, who is left alone, and that it ends as it began."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tests.fakes.registry_world import eventually
from tests.fakes.worker_world import TOKEN, WorkerWorld, model, outputs, publish_ranker, ranking, snapshot, worker_world

from model_worker.process_instance import State as ProcessState
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import DeadlineExceeded, PlaitError, Unavailable, from_rpc_error
from plait.registry.records import Execution, ModelVersion

ONE = [1.0, 2.0, 3.0]
ROWS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
QUICKLY_OUT = {"severe": 3, "backoff_s": 0.05, "max_backoff_s": 0.05, "test_timeout_s": 0.3}
BUDGET_S = 0.3


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_ranker(tmp_path_factory.mktemp("ranker") / "1")


async def refused(call: Any) -> PlaitError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


async def ready(w: WorkerWorld, name: str = "") -> bool:
    if not name:
        return bool((await w.stub.ServerReady(pb.ServerReadyRequest(), metadata=TOKEN)).ready)
    return bool((await w.stub.ModelReady(pb.ModelReadyRequest(name=name), metadata=TOKEN)).ready)


@pytest.mark.parametrize(("ready_when", "server_ready"), [("any", True), ("all", False)])
async def test_a_model_that_hangs_is_taken_out_and_loaded_anew_and_no_memory_is_lost(
    v1: ModelVersion, ready_when: str, server_ready: bool
) -> None:
    settings = {"compute_timeout_s": BUDGET_S, "quarantine": QUICKLY_OUT, "ready_when": ready_when, "unload_timeout_s": 1.0}
    async with worker_world(snapshot(model("ranker", v1), model("other", v1)), models=settings) as w:
        before = _claims(w)
        first = w.models.get("ranker")
        hanging = _hang(w, "ranker")
        for _ in range(3):
            error = await refused(w.infer(ranking(ONE, ROWS)))
            assert (type(error), error.reason) == (DeadlineExceeded, "MODEL_HUNG")
        error = await refused(w.infer(ranking(ONE, ROWS)))
        assert (type(error), error.reason) == (Unavailable, "MODEL_QUARANTINED")
        assert (await ready(w, "ranker"), await ready(w, "other"), await ready(w)) == (False, True, server_ready)
        assert outputs(await w.infer(ranking(ONE, ROWS, model_name="other")))["score"] == [1, 5]

        # Its self-test hangs twice, then it is loaded anew; what hangs keeps its memory accounted until it comes back.
        await eventually(lambda: w.states() == {"ranker/1": "READY", "other/1": "READY"}, 60)
        assert w.models.get("ranker") is not first
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        assert (await ready(w, "ranker"), await ready(w)) == (True, True)
        assert len(_claims(w)) == len(before) + 1
        hanging.set()
        await eventually(lambda: sorted(c.name for c in _claims(w)) == sorted(c.name for c in before))


async def test_processes_that_are_killed_over_and_over_leave_the_books_right(tmp_path: Path) -> None:
    version = publish_ranker(tmp_path / "m", execution=Execution(instances=2, kind="process"))
    async with worker_world(snapshot(model("ranker", version)), models={"quarantine": {"faults": 0}}) as w:
        served = w.models.get("ranker")
        processes: Any = served.prepared.models
        [claim] = _claims(w)
        assert claim.size_bytes > 2 * 10_000_000  # two processes with a library each, not only a model of 4 bytes
        here, killed = psutil.Process(), set()
        descriptors = here.num_fds()

        async def calls() -> list[Any]:
            return [await w.infer(ranking(ONE, ROWS)) for _ in range(50)]

        for n in range(2):
            load = [asyncio.create_task(calls()) for _ in range(4)]
            await w.infer(ranking(ONE, ROWS))
            victim = processes[n % 2].pid
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)
            assert all(outputs(answer)["score"] == [1, 5] for part in await asyncio.gather(*load) for answer in part)
            await eventually(lambda: all(m.state is ProcessState.READY for m in processes), 60)
        assert not any(psutil.pid_exists(pid) for pid in killed)
        assert _claims(w) == [claim]
        await eventually(lambda: here.num_fds() <= descriptors + 4)  # memory that is mapped once more
        assert [m.restarts for m in processes] == [1, 1]


async def test_where_every_process_is_killed_callers_are_told_and_those_to_come_are_served(tmp_path: Path) -> None:
    version = publish_ranker(tmp_path / "m", execution=Execution(instances=1, kind="process"))
    async with worker_world(snapshot(model("ranker", version)), models={"quarantine": {"faults": 0}}) as w:
        [process] = w.models.get("ranker").prepared.models
        pid = process.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)  # in mid-batch, and it stays there
        waiting = [asyncio.create_task(w.infer(ranking(ONE, ROWS))) for _ in range(8)]
        await eventually(lambda: w.models.get("ranker").instances.free() is None)
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*waiting)
        assert all(outputs(answer)["score"] == [1, 5] for answer in answers)


def _claims(w: WorkerWorld) -> list[Any]:
    return list(w.models._ledger._claims)


def _hang(w: WorkerWorld, name: str) -> Any:
    """Have every pass of what serves this model now wait for the event that is returned."""
    event = threading.Event()
    gated: Any = {instance.model for instance in w.models.get(name).instances._all}
    for one in gated:
        inner = one._model
        one._model = _Hanging(inner, event)
    return event


class _Hanging:
    """A loaded model that waits before it computes."""

    def __init__(self, inner: Any, event: Any) -> None:
        self._inner = inner
        self._event = event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, inputs: Any) -> Any:
        assert self._event.wait(60)
        return self._inner(inputs)
