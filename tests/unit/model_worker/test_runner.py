"""The thread a model computes in."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from model_worker.runner import Runner


async def result_of(runner: Runner, work: Any) -> Any:
    """Run `work` there and return what `done` was told, as (result, error)."""
    told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    runner.start(work, lambda result, error: told.set_result((result, error)))
    return await told


async def test_jobs_run_in_order_in_one_thread_that_was_prepared() -> None:
    prepared: list[int] = []
    runner = Runner("model m/1", lambda: prepared.append(threading.get_ident()))
    assert await result_of(runner, threading.get_ident) == (prepared[0], None)
    assert prepared[0] != threading.get_ident()
    order: list[int] = []
    for n in range(50):
        runner.start(lambda n=n: order.append(n), lambda *_: None)
    await result_of(runner, lambda: None)
    assert order == list(range(50))
    assert "model m/1 running" in repr(runner)
    await runner.stop()
    assert "stopped" in repr(runner)


async def test_an_error_is_told_and_the_thread_goes_on() -> None:
    runner = Runner("model", lambda: None)
    result, error = await result_of(runner, lambda: 1 / 0)
    assert result is None
    assert isinstance(error, ZeroDivisionError)
    assert await result_of(runner, lambda: 2) == (2, None)
    await runner.stop()


async def test_stop_lets_what_was_given_finish() -> None:
    runner, gate, done = Runner("model", lambda: None), threading.Event(), []
    runner.start(lambda: gate.wait(20), lambda *_: done.append(1))
    runner.start(lambda: None, lambda *_: done.append(2))
    stopping = asyncio.create_task(runner.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    gate.set()
    await stopping
    assert done == [1, 2]


async def test_a_thread_that_waits_keeps_nothing_of_the_last_job_alive() -> None:
    class Tensor:
        pass

    runner = Runner("model", lambda: None)
    tensor = Tensor()
    seen = weakref.ref(tensor)
    await result_of(runner, lambda held=tensor: held)
    del tensor
    await result_of(runner, lambda: None)
    gc.collect()
    assert seen() is None
    await runner.stop()


def test_a_loop_that_was_closed_does_not_break_the_thread(recwarn: pytest.WarningsRecorder) -> None:
    gate = threading.Event()

    async def leave() -> Runner:
        runner = Runner("model", lambda: None)
        runner.start(lambda: gate.wait(20), lambda *_: None)
        return runner

    runner = asyncio.run(leave())
    gate.set()
    runner._jobs.put(None)
    runner._thread.join(20)
    assert not runner._thread.is_alive()
    assert not recwarn.list
