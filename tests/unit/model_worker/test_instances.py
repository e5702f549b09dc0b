"""Which instance computes next, and what becomes of one that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from model_worker.instances import Instances


class Still:
    """A model that does nothing."""

    platform = "still"
    memory_bytes = 0
    prepared = 0

    def prepare_thread(self) -> None:
        self.prepared += 1

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def close(self) -> None:
        """Nothing to give back."""


async def test_free_instances_are_handed_out_until_all_are_busy() -> None:
    model = Still()
    instances = Instances("m/1", (model, model))
    first = instances.free()
    assert first is not None
    first.batch = object()
    second = instances.free()
    assert second is not None
    assert second is not first
    second.batch = object()
    assert instances.free() is None
    assert "busy" in repr(instances)
    first.batch = None
    assert instances.free() is first
    await instances.stop()
    assert model.prepared == 2


async def test_an_instance_that_hangs_is_replaced_a_few_times() -> None:
    release, instances = threading.Event(), Instances("m/1", (Still(),))
    for _ in range(4):
        stuck = instances.free()
        assert stuck is not None
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        stuck.start(lambda: (loop.call_soon_threadsafe(started.set), release.wait(30)), lambda *_: None)  # noqa: B023
        await started.wait()
        instances.give_up(stuck)
        assert len(instances) == 1
    last = instances.free()
    assert last is not None
    last.start(lambda: release.wait(30), lambda *_: None)
    instances.give_up(last)
    assert len(instances) == 0
    assert instances.free() is None
    assert instances.stuck == 5
    release.set()
    await instances.ended()
    assert instances.stuck == 0
    fresh = instances.free()  # there is room for a thread again
    assert fresh is not None
    assert instances.free() is fresh
    assert len(instances) == 1
    await instances.stop()


async def test_all_are_given_up_at_once_where_nothing_else_helps() -> None:
    release, instances = threading.Event(), Instances("m/1", (Still(), Still()))
    busy = instances.free()
    assert busy is not None
    busy.batch = object()
    busy.start(lambda: release.wait(30), lambda *_: None)
    instances.abandon()
    assert (len(instances), instances.free()) == (0, None)
    await instances.stop()  # waits for none of them
    release.set()
    await instances.ended()
    assert instances.stuck == 0
