"""Loads under way: their slots, their time, and the memory they claim, whatever becomes of them."""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.fakes.registry_world import eventually

from model_worker import memory_limit
from model_worker.artifacts import Sample
from model_worker.lifecycle import Entry, Key
from model_worker.loads import MAX_PER_VERSION, Load, Loads
from model_worker.memory import Ledger
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest, FileDigest
from plait.registry.records import ModelVersion, TensorSpec

VERSION = ModelVersion(version="1", artifact="/m/1", digest="sha256:1")
ROWS = TensorSpec(name="x", dtype="float32", shape=(-1,))
SAMPLE = Sample(inputs=(np.zeros(2, np.float32),), outputs=None, tolerance=0.0)
MANIFEST = ArtifactManifest(
    name="m", format="torchscript", entry="m", inputs=(ROWS,), outputs=(ROWS,), files={"m": FileDigest(sha256="0", size_bytes=1000)}
)
CLAIMED = 1500  # what a TorchScript file of 1000 bytes is estimated to need on a GPU
CLAIMED_ON_CPU = 5100


@dataclass
class Prepared:
    memory_bytes: int
    closed: int = 0

    def close(self) -> None:
        self.closed += 1


@dataclass
class Loader:
    """Is let in, waits for `may_end`, and then loads `memory_bytes` or fails."""

    memory_bytes: int = 1000
    device: str = "cuda:0"  # where nothing but the weights is counted
    error: Exception | None = None
    may_end: threading.Event = field(default_factory=threading.Event)
    prepared: list[Prepared] = field(default_factory=list)

    def prepare(self, version: ModelVersion, admit: Any) -> Prepared:
        admit(SimpleNamespace(manifest=MANIFEST, sample=SAMPLE), self.device, 1)
        assert self.may_end.wait(30)
        if self.error is not None:
            raise self.error
        self.prepared.append(Prepared(self.memory_bytes))
        return self.prepared[-1]


class World:
    def __init__(self, loader: Loader, *, budget: int | None = None, **settings: Any) -> None:
        self.loader = loader
        self.ledger = Ledger(lambda _: budget)
        self.loads = Loads(ModelSettings(**settings), loader, self.ledger)  # type: ignore[arg-type]

    def begin(self, key: Key = ("a", "1")) -> Load:
        return self.loads.begin(key, Entry(version=VERSION), VERSION)

    @property
    def used(self) -> int:
        return self.ledger.used_bytes(self.loader.device)


async def ended(load: Load) -> None:
    """Return once it has ended, in whatever way, and that was noted."""
    await asyncio.wait({load.work})
    await asyncio.sleep(0)


async def late(w: World, load: Load) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        await w.loads.result(load)
    return refused.value.reason


async def test_a_load_takes_a_slot_and_its_estimate_until_it_is_measured() -> None:
    w = World(Loader(), load_concurrency=2)
    load = w.begin()
    await eventually(lambda: load.claim is not None)
    assert (w.loads.slots, w.used) == (1, CLAIMED)
    w.loader.may_end.set()
    found: object = await w.loads.result(load)
    assert found is w.loader.prepared[0]
    await ended(load)
    assert (w.loads.slots, w.used, load.sample) == (2, 1000, SAMPLE)
    assert load.need is not None
    assert load.need.size_bytes == CLAIMED  # what it will take to load it once more
    w.loads.release(load)
    w.loads.release(load)
    assert w.used == 0


async def test_threads_take_turns_more_often_while_something_is_loaded() -> None:
    calm_s = sys.getswitchinterval()
    w = World(Loader())
    first, second = w.begin(), w.begin()
    assert sys.getswitchinterval() < calm_s / 2
    w.loader.may_end.set()
    for load in (first, second):
        await ended(load)
    await eventually(lambda: sys.getswitchinterval() == calm_s)


async def test_what_is_dropped_is_closed_and_its_memory_free() -> None:
    w = World(Loader())
    w.loader.may_end.set()
    load = w.begin()
    await w.loads.drop(load, await w.loads.result(load))
    assert (w.loader.prepared[0].closed, w.used) == (1, 0)


async def test_a_load_that_fails_gives_everything_back() -> None:
    w = World(Loader(error=FailedPrecondition("torn", reason="ARTIFACT_CORRUPT")), load_concurrency=1)
    w.loader.may_end.set()
    load = w.begin()
    assert await late(w, load) == "ARTIFACT_CORRUPT"
    await ended(load)
    assert (w.loads.slots, w.used, load.claim) == (1, 0, None)


async def test_what_does_not_fit_is_not_loaded() -> None:
    w = World(Loader(), budget=CLAIMED - 1)
    load = w.begin()
    assert await late(w, load) == "MEMORY_EXCEEDED"
    assert (w.loader.prepared, w.used) == ([], 0)
    assert load.need is not None
    assert load.need.size_bytes == CLAIMED  # the room to be made before it is tried again


async def test_what_turns_out_larger_than_the_budget_is_closed() -> None:
    w = World(Loader(memory_bytes=6000), budget=CLAIMED)
    w.loader.may_end.set()
    load = w.begin()
    assert await late(w, load) == "MEMORY_EXCEEDED"
    await ended(load)
    assert (w.loader.prepared[0].closed, w.used) == (1, 0)


@pytest.mark.parametrize(
    ("device", "memory_bytes", "grown", "counted"),
    [
        ("cpu", 1000, 0, 1000),
        ("cpu", 1000, -50, 1000),  # others may have given memory back
        ("cpu", 1000, 3000, 3000),
        ("cpu", 1000, 90_000, CLAIMED_ON_CPU),  # others may have grown too
        ("cpu", 8000, 90_000, 8000),
        ("cuda:0", 1000, 3000, 1000),
    ],
)
async def test_growth_of_the_process_counts_up_to_the_estimate(
    monkeypatch: pytest.MonkeyPatch, device: str, memory_bytes: int, grown: int, counted: int
) -> None:
    readings = iter([10_000, 10_000 + grown])
    monkeypatch.setattr(memory_limit, "resident_bytes", lambda: next(readings))
    w = World(Loader(memory_bytes=memory_bytes, device=device))
    w.loader.may_end.set()
    load = w.begin()
    await w.loads.result(load)
    assert load.need is not None
    assert (w.used, load.need.size_bytes) == (counted, max(counted, CLAIMED_ON_CPU if device == "cpu" else CLAIMED))


async def test_an_overdue_load_gives_its_slot_back_but_keeps_its_memory() -> None:
    w = World(Loader(), load_timeout_s=0.01, load_concurrency=1)
    load = w.begin()
    assert await late(w, load) == "LOAD_TIMEOUT"
    await eventually(lambda: load.claim is not None)
    assert (w.loads.overdue, w.loads.slots, w.used, w.loads.held_up()) == (1, 1, CLAIMED, set())
    assert repr(w.loads) == "<Loads running=0/1 overdue=1>"
    w.loader.may_end.set()
    await w.loads.result(load)  # there is no limit to waiting for it now
    await ended(load)
    assert (w.loads.overdue, w.loads.slots) == (0, 1)


async def test_overdue_loads_are_limited_per_version_and_in_all() -> None:
    w = World(Loader(), load_timeout_s=0.01, load_concurrency=5, max_overdue_loads=3)
    loads = [w.begin(("a", "1")) for _ in range(MAX_PER_VERSION)]
    for load in loads:
        await late(w, load)
    assert (w.loads.held_up(), w.loads.slots) == ({("a", "1")}, 5)
    loads.append(w.begin(("b", "1")))
    await late(w, loads[-1])
    assert (w.loads.held_up(), w.loads.slots) == ({("a", "1")}, 0)
    w.loader.may_end.set()
    for load in loads:
        await ended(load)
    assert (w.loads.held_up(), w.loads.slots) == (set(), 5)


async def test_no_limit_in_all_is_no_limit() -> None:
    w = World(Loader(), load_timeout_s=0.01, load_concurrency=1, max_overdue_loads=0)
    load = w.begin()
    await late(w, load)
    assert w.loads.slots == 1
    w.loader.may_end.set()
    await ended(load)


async def test_settling_waits_for_what_is_in_time_only() -> None:
    w = World(Loader(), load_timeout_s=0.01)
    hangs = w.begin()
    await late(w, hangs)
    await asyncio.wait_for(w.loads.settle(1000.0), 30)  # the one that hangs is not waited for
    quick = w.begin(("b", "1"))
    settling = asyncio.create_task(w.loads.settle(1000.0))
    w.loader.may_end.set()
    await asyncio.wait_for(settling, 30)
    assert quick.work.done()
    await ended(hangs)
