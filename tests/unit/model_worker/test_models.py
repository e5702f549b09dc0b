"""Following the registry, with a loader that succeeds, fails, hangs and waits on order."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.fakes.registry_world import eventually

from model_worker.artifacts import Sample
from model_worker.instruments import Instruments
from model_worker.lifecycle import NEVER
from model_worker.memory import Ledger
from model_worker.models import Models
from model_worker.quarantine import Fault, Health
from model_worker.settings import ModelSettings
from plait.errors import DeadlineExceeded, FailedPrecondition, Internal, NotFound, PermissionDenied, PlaitError, Unavailable, Violation
from plait.registry.artifact import ArtifactManifest, FileDigest
from plait.registry.records import Model, ModelVersion, Snapshot, TensorSpec, VersionPolicy
from plait.telemetry.metrics import Metrics

V1, V2, V3 = (ModelVersion(version=v, artifact=f"/m/{v}", digest=f"sha256:{v}") for v in "123")
ROWS = TensorSpec(name="x", dtype="float32", shape=(-1,))
SIZE = 1000  # bytes of every artifact; 5.1 times that are claimed while it is loaded
CLAIMED = 5100
MANIFEST = ArtifactManifest(
    name="m", format="torchscript", entry="m", inputs=(ROWS,), outputs=(ROWS,), files={"m": FileDigest(sha256="0", size_bytes=SIZE)}
)


@dataclass
class FakeServed:
    """A model that serves until it was closed; `may_close` lets it. Answers its self-test rightly unless `error` says otherwise."""

    model: str
    version: str
    digest: str
    may_close: asyncio.Event
    health: Health
    closed: bool = False
    tested: int = 0
    error: Exception | None = None
    manifest: ArtifactManifest = MANIFEST
    broken: Exception | None = None  # raised by close
    hangs: bool = False
    abandoned: bool = False
    came_back: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def instances(self) -> FakeServed:
        return self

    async def ended(self) -> None:
        await self.came_back.wait()

    async def abandon(self) -> None:
        self.abandoned = True

    @property
    def batcher(self) -> FakeServed:
        return self

    async def submit(self, inputs: Any, rows: int, deadline_s: float) -> Any:
        self.tested += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(outputs=inputs)

    def fail(self, times: int = 10, kind: Fault = Fault.EXECUTION) -> None:
        for _ in range(times):
            self.health.fault(kind)

    async def close(self) -> None:
        await self.may_close.wait()
        self.closed = True
        if self.broken is not None:
            raise self.broken


@dataclass
class FakePrepared:
    digest: str
    memory_bytes: int
    proven: str = "proven"
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLoader:
    """Loads anything but what `errors` names by "artifact"; waits for `may_load`, and for what `hang` names; notes what it was asked for."""

    errors: dict[str, Exception] = field(default_factory=dict)
    hang: dict[str, threading.Event] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    prepared: list[FakePrepared] = field(default_factory=list)
    served: list[FakeServed] = field(default_factory=list)
    may_load: threading.Event = field(default_factory=threading.Event)
    may_close: asyncio.Event = field(default_factory=asyncio.Event)
    memory_bytes: int = SIZE
    cannot_serve: Exception | None = None

    def prepare(self, version: ModelVersion, admit: Any) -> FakePrepared:
        self.asked.append(version.artifact)
        sample = np.zeros(2, np.float32)
        admit(SimpleNamespace(manifest=MANIFEST, sample=Sample(inputs=(sample,), outputs=(sample,), tolerance=1e-4)), "cpu", 1)
        assert self.may_load.wait(30)
        assert self.hang.get(version.artifact, self.may_load).wait(30)
        if version.artifact in self.errors:
            raise self.errors[version.artifact]
        self.prepared.append(FakePrepared(version.digest, self.memory_bytes))
        return self.prepared[-1]

    def serve(self, model: str, version: str, prepared: FakePrepared, health: Health) -> FakeServed:
        if self.cannot_serve is not None:
            raise self.cannot_serve
        self.served.append(FakeServed(model, version, prepared.digest, self.may_close, health))
        return self.served[-1]


class World:
    def __init__(self, models: Models, loader: FakeLoader, metrics: Metrics, ledger: Ledger) -> None:
        self.models = models
        self.loader = loader
        self.metrics = metrics
        self.ledger = ledger
        self.revision = 0

    def adopt(self, *models: Model) -> None:
        self.revision += 1
        self.models.adopt(Snapshot(revision=self.revision, models={m.name: m for m in models}))

    def states(self) -> dict[str, str]:
        return {f"{name}/{entry.version.version}": entry.state.name for name, entry in self.models.entries()}

    async def become(self, **states: str) -> None:
        await eventually(lambda: self.states() == {name.replace("_", "/"): state for name, state in states.items()})

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"plait_model_worker_{name}", labels)


@asynccontextmanager
async def world(*, budget: int | None = None, **settings: Any) -> AsyncIterator[World]:
    metrics, loader = Metrics(), FakeLoader()
    loader.may_load.set()
    loader.may_close.set()
    ledger = Ledger(lambda _: budget)
    models = Models(ModelSettings(**settings), loader, Instruments(metrics), ledger)  # type: ignore[arg-type]
    follower = asyncio.create_task(models.run())
    try:
        yield World(models, loader, metrics, ledger)
    finally:
        for event in (loader.may_load, *loader.hang.values()):
            event.set()
        loader.may_close.set()
        await models.close()
        assert not follower.done() or follower.result()
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)


def of(*versions: ModelVersion, name: str = "a", policy: VersionPolicy | None = None, **aliases: str) -> Model:
    return Model(name=name, versions=versions, aliases=aliases, version_policy=policy or VersionPolicy())


def refusal(models: Models, model: str, version: str = "") -> PlaitError:
    with pytest.raises(PlaitError) as refused:
        models.get(model, version)
    return refused.value


async def test_what_the_registry_names_is_loaded_and_served() -> None:
    async with world() as w:
        w.adopt(of(V1), of(V1, V2, name="b", champion="1"))
        await w.become(a_1="READY", b_1="READY", b_2="READY")
        assert w.models.ready
        assert w.models.get("b").version == "2"
        assert w.models.get("b", "1").version == "1"
        assert w.models.serving("b") == ["1", "2"]
        assert (w.models.version_policy("b"), w.models.version_policy("nobody")) == (VersionPolicy(), VersionPolicy())
        assert repr(w.models) == "<Models ready=3/3 revision=1 leaving=0>"
        assert w.sample("ready", model="b", version="2") == 1
        assert w.sample("loads_total", model="b", outcome="READY") == 2
        assert (w.sample("memory_bytes", model="b", version="2") or 0) >= SIZE


@pytest.mark.parametrize(("when", "expected"), [("any", [False, True, False, True]), ("all", [False, True, False, True]), ("live", [True])])
async def test_whether_the_worker_is_ready_is_told_whenever_it_changes(when: str, expected: list[bool]) -> None:
    async with world(ready_when=when, quarantine={"backoff_s": 0.01}) as w:
        told: list[bool] = []

        async def listen() -> None:
            async for ready in w.models.readiness():
                told.append(ready)  # noqa: PERF401 - it is looked at while it grows

        listener = asyncio.create_task(listen())
        w.loader.may_load.clear()
        w.adopt(of(V1))
        await w.become(a_1="LOADING")
        w.loader.may_load.set()
        await w.become(a_1="READY")
        w.loader.served[0].error = Internal("it fails its test")
        w.loader.served[0].fail()
        await w.become(a_1="QUARANTINED")
        w.loader.served[0].error = None
        await w.become(a_1="READY")
        await eventually(lambda: told == expected)
        listener.cancel()


async def test_where_nothing_is_wanted_or_all_has_failed_that_is_told_too() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = FailedPrecondition("torn", reason="ARTIFACT_CORRUPT")
        w.adopt(of(V1), of(V2, name="b"))
        ready = w.models.readiness()
        assert await anext(ready) is False
        assert await asyncio.wait_for(anext(ready), 10) is True  # one of them serves, the other was tried
        assert w.states() == {"a/1": "FAILED", "b/2": "READY"}


async def test_tritons_word_for_any_version_is_taken() -> None:
    async with world() as w:
        w.adopt(of(V1, V2, champion="1"))
        await w.become(a_1="READY", a_2="READY")
        assert w.models.get("a", "-1") is w.models.get("a") is w.models.get("a", "2")
        assert "Request for unknown model: nobody" in refusal(w.models, "nobody", "-1").message


async def test_what_is_not_held_is_told_with_the_reason() -> None:
    async with world(repository_control=True, load_concurrency=1) as w:
        w.loader.may_load.clear()
        w.adopt(of(V1), of(V1, name="b"), of(V1, name="forgotten", policy=VersionPolicy(specific=("9",), latest=0)))
        await w.become(a_1="LOADING")
        assert w.models.not_held() == [
            ("b", "LOADING", "waits for its turn to be loaded"),
            ("forgotten", "UNAVAILABLE", "no route, alias or version policy refers to it"),
        ]
        w.loader.may_load.set()
        await w.become(a_1="READY", b_1="READY")
        await w.models.unload("b", 10)
        assert w.models.not_held()[0] == ("b", "UNAVAILABLE", "unloaded")


async def test_while_it_loads_callers_are_told_to_come_back() -> None:
    async with world() as w:
        w.loader.may_load.clear()
        w.adopt(of(V1))
        for version in ("", "1"):
            error = refusal(w.models, "a", version)
            assert (type(error), error.reason) == (Unavailable, "MODEL_LOADING")
            assert error.retry_after_s
        await w.become(a_1="LOADING")
        assert not w.models.ready
        w.loader.may_load.set()
        await w.become(a_1="READY")


async def test_what_cannot_be_loaded_says_why_and_the_rest_is_served() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = FailedPrecondition(
            "two files differ", reason="ARTIFACT_CORRUPT", violations=[Violation("model.pt", "gone")]
        )
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="FAILED", b_2="READY")
        error = refusal(w.models, "a")
        assert (type(error), error.reason) == (FailedPrecondition, "MODEL_FAILED")
        assert error.message == "a could not be loaded: two files differ: model.pt: gone (ARTIFACT_CORRUPT)"
        assert w.models.get("b").version == "2"
        assert w.sample("ready", model="a", version="1") == 0


async def test_an_unforeseen_error_is_logged_and_not_told() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = ZeroDivisionError("secret")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        error = refusal(w.models, "a", "1")
        assert "ZeroDivisionError" in error.message
        assert "secret" not in error.message


async def test_what_failed_is_tried_again_until_it_can_be_served() -> None:
    async with world(retry_s=0.001) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await eventually(lambda: len(w.loader.asked) >= 4)
        [(_, entry)] = w.models.entries()
        assert entry.attempts >= 3
        w.loader.errors.clear()
        await w.become(a_1="READY")
        assert (entry.attempts, entry.error) == (0, None)
        assert w.models.get("a").version == "1"


async def test_what_failed_is_not_tried_before_its_time_because_something_else_changed() -> None:
    async with world(retry_s=1000.0) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="FAILED", b_2="READY")
        assert w.loader.asked == ["/m/1", "/m/2"]


async def test_a_retry_under_way_still_says_what_failed() -> None:
    async with world(retry_s=0.001) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.loader.may_load.clear()
        await w.become(a_1="LOADING")
        assert refusal(w.models, "a").reason == "MODEL_FAILED"


async def test_one_version_that_failed_does_not_hide_that_another_is_coming() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.loader.may_load.clear()
        w.adopt(of(V1, V2, old="1"))
        await w.become(a_1="FAILED", a_2="LOADING")
        assert refusal(w.models, "a").reason == "MODEL_LOADING"


async def test_unknown_and_unserved_are_told_apart() -> None:
    async with world() as w:
        w.adopt(of(V1, V2))
        await w.become(a_2="READY")
        for model, version, reason in (("x", "", "MODEL_NOT_FOUND"), ("a", "9", "MODEL_NOT_FOUND"), ("a", "1", "MODEL_NOT_SERVED")):
            error = refusal(w.models, model, version)
            assert (type(error), error.reason) == (NotFound, reason)
            assert "Request for unknown model" in error.message


async def test_a_version_that_leaves_is_out_of_sight_but_finishes_what_it_holds() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1, champion="1"))
        await w.become(a_1="READY")
        w.loader.may_close.clear()
        w.adopt(of(V1, V2))
        await w.become(a_2="READY")
        [old, new] = w.loader.served
        assert not old.closed
        assert "leaving=1" in repr(w.models)
        assert isinstance(refusal(w.models, "a", "1"), NotFound)
        w.loader.may_close.set()
        await eventually(lambda: old.closed)
        assert not new.closed
        await eventually(lambda: w.sample("ready", model="a", version="1") is None)


async def test_a_model_that_was_deleted_is_still_served_by_version_for_a_while() -> None:
    async with world(unload_after_s=1000.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.adopt()
        await eventually(lambda: all(e.unwanted_since_s < 1e300 for _, e in w.models.entries()))
        assert w.models.get("a", "1").version == "1"
        assert w.models.ready


async def test_a_version_that_became_another_is_loaded_anew() -> None:
    async with world() as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.adopt(of(ModelVersion(version="1", artifact="/other", digest="sha256:other")))
        await eventually(lambda: [s.closed for s in w.loader.served] == [True, False])
        assert w.models.get("a").digest == "sha256:other"  # type: ignore[attr-defined]
        assert w.sample("ready", model="a", version="1") == 1


# --- version policy


async def test_a_request_without_a_version_gets_the_newest_ready_one_of_the_policy() -> None:
    async with world() as w:
        w.adopt(of(V1, V2, V3, policy=VersionPolicy(specific=("1", "2")), shadow="3"))
        await w.become(a_1="READY", a_2="READY", a_3="READY")
        assert w.models.get("a").version == "2"
        assert w.models.get("a", "3").version == "3"


async def test_a_version_that_the_policy_drops_leaves() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1, V2, V3, policy=VersionPolicy(latest=2)))
        await w.become(a_2="READY", a_3="READY")
        w.adopt(of(V1, V2, V3))
        await w.become(a_3="READY")


# --- loading side by side


async def test_so_many_versions_are_loaded_at_once() -> None:
    async with world(load_concurrency=3) as w:
        w.loader.may_load.clear()
        w.adopt(*(of(V1, name=name) for name in "abcde"))
        await eventually(lambda: len(w.loader.asked) == 3)
        assert sorted(w.states().values()) == ["LOADING"] * 3
        w.loader.may_load.set()
        await w.become(**{f"{name}_1": "READY" for name in "abcde"})


async def test_a_load_that_hangs_fails_in_time_and_keeps_nobody_from_loading() -> None:
    async with world(load_concurrency=1, load_timeout_s=0.05, retry_s=1000.0) as w:
        w.loader.hang["/m/1"] = threading.Event()
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="FAILED", b_2="READY")
        error = refusal(w.models, "a")
        assert error.reason == "MODEL_FAILED"
        assert "LOAD_TIMEOUT" in error.message
        assert w.sample("overdue_loads") == 1
        assert w.models.ready
        w.loader.hang["/m/1"].set()  # better late than never
        await w.become(a_1="READY", b_2="READY")
        await eventually(lambda: w.sample("overdue_loads") == 0)
        assert w.loader.asked == ["/m/1", "/m/2"]


async def test_a_version_whose_loads_hang_is_tried_twice_and_then_waits_for_a_thread() -> None:
    async with world(load_timeout_s=0.01, retry_s=0.001, max_retry_s=0.001) as w:
        w.loader.hang["/m/1"] = threading.Event()
        w.adopt(of(V1))
        await eventually(lambda: len(w.loader.asked) == 2 and w.sample("overdue_loads") == 2)
        await w.become(a_1="FAILED")
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="FAILED", b_2="READY")
        assert w.loader.asked == ["/m/1", "/m/1", "/m/2"]
        w.loader.hang["/m/1"].set()
        await w.become(a_1="READY", b_2="READY")
        await eventually(lambda: sorted(p.closed for p in w.loader.prepared) == [False, False, True])
        await eventually(lambda: w.ledger.used_bytes("cpu") <= 2 * CLAIMED)


async def test_too_many_hanging_loads_stop_all_loading_until_one_ends() -> None:
    async with world(load_timeout_s=0.01, retry_s=1000.0, max_overdue_loads=1) as w:
        w.loader.hang["/m/1"] = threading.Event()
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.adopt(of(V1), of(V2, name="b"))
        await asyncio.sleep(0)
        assert w.states() == {"a/1": "FAILED"}
        w.loader.hang["/m/1"].set()
        await w.become(a_1="READY", b_2="READY")


async def test_a_version_that_is_no_longer_wanted_when_it_is_loaded_is_let_go() -> None:
    async with world() as w:
        w.loader.may_load.clear()
        w.adopt(of(V1))
        await w.become(a_1="LOADING")
        w.adopt()
        await w.become()
        w.loader.may_load.set()
        await eventually(lambda: [p.closed for p in w.loader.prepared] == [True])
        await eventually(lambda: w.ledger.used_bytes("cpu") == 0)
        assert w.loader.served == []


async def test_old_bytes_that_were_loading_do_not_serve_for_new_ones() -> None:
    async with world() as w:
        w.loader.hang["/m/1"] = threading.Event()
        w.adopt(of(V1))
        await w.become(a_1="LOADING")
        w.adopt(of(dataclasses.replace(V1, artifact="/other", digest="sha256:other")))
        await w.become(a_1="READY")
        w.loader.hang["/m/1"].set()
        await eventually(lambda: [p.closed for p in w.loader.prepared] == [False, True])
        assert [s.digest for s in w.loader.served] == ["sha256:other"]


# --- memory


async def test_what_does_not_fit_is_refused_in_words_and_the_rest_serves() -> None:
    async with world(budget=CLAIMED + SIZE, load_concurrency=1, retry_s=1000.0) as w:
        w.loader.memory_bytes = 2 * SIZE
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="READY", b_2="FAILED")
        error = refusal(w.models, "b")
        assert (type(error), error.reason) == (FailedPrecondition, "MEMORY_EXCEEDED")
        assert "b/2 needs 4.98 KiB of cpu memory" in error.message
        assert "of 5.96 KiB are held by a/1" in error.message
        assert w.models.get("a").version == "1"
        w.adopt(of(V2, name="b"))  # nothing refers to a any more: it makes room at once, long before unload_after_s
        await w.become(b_2="READY")


async def test_the_old_version_is_not_given_up_for_a_new_one_that_does_not_fit() -> None:
    async with world(budget=CLAIMED + SIZE, unload_after_s=0.0, retry_s=1000.0) as w:
        w.loader.memory_bytes = 2 * SIZE
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.adopt(of(V1, V2))
        await w.become(a_1="READY", a_2="FAILED")
        assert w.models.get("a").version == "1"
        assert refusal(w.models, "a", "2").reason == "MEMORY_EXCEEDED"


async def test_a_version_that_holds_more_than_the_budget_once_loaded_is_refused_too() -> None:
    async with world(budget=CLAIMED + SIZE, retry_s=1000.0) as w:
        w.loader.memory_bytes = 20 * SIZE
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        assert refusal(w.models, "a").reason == "MEMORY_EXCEEDED"
        assert [p.closed for p in w.loader.prepared] == [True]
        assert w.ledger.used_bytes("cpu") == 0
        [(_, entry)] = w.models.entries()
        assert entry.need is not None
        assert entry.need.size_bytes == 20 * SIZE


async def test_memory_is_free_again_once_a_version_has_left() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        assert w.ledger.used_bytes("cpu") >= SIZE
        w.loader.may_close.clear()
        w.adopt()
        await w.become()
        assert w.ledger.used_bytes("cpu") >= SIZE  # it still answers what it holds
        w.loader.may_close.set()
        await eventually(lambda: w.ledger.used_bytes("cpu") == 0)


async def test_a_failed_load_holds_no_memory() -> None:
    async with world(retry_s=1000.0) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        assert w.ledger.used_bytes("cpu") == 0


# --- readiness


@pytest.mark.parametrize(("when", "one_failed", "loading_more"), [("all", False, False), ("any", True, True), ("live", True, True)])
async def test_when_the_worker_is_ready(when: str, one_failed: bool, loading_more: bool) -> None:
    async with world(ready_when=when, load_concurrency=1) as w:
        assert w.models.ready is (when == "live")
        w.loader.hang["/m/1"] = threading.Event()
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V2, name="b"), of(V1))
        await w.become(a_1="LOADING", b_2="READY")
        assert w.models.ready is (when == "live")  # the first tries are not over yet
        w.loader.hang["/m/1"].set()
        await w.become(a_1="FAILED", b_2="READY")
        await eventually(lambda: w.models.ready is one_failed)
        w.loader.may_load.clear()
        w.adopt(of(V2, name="b"), of(V3, name="c"))
        await w.become(b_2="READY", c_3="LOADING")
        assert w.models.ready is loading_more


async def test_a_worker_without_a_ready_model_is_not_ready_by_any() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        assert not w.models.ready
        w.adopt()
        await eventually(lambda: w.models.ready)  # nothing to serve, which it does


# --- quarantine

QUICK = {"backoff_s": 0.01, "max_backoff_s": 0.02}
SLOW = {"backoff_s": 100.0, "max_backoff_s": 100.0}


async def test_a_version_that_keeps_failing_is_taken_out_and_an_older_one_stands_in() -> None:
    async with world(quarantine=SLOW) as w:
        w.adopt(of(V1, V2, policy=VersionPolicy(latest=2)))
        await w.become(a_1="READY", a_2="READY")
        w.models.get("a").fail(9)  # type: ignore[attr-defined]
        assert w.models.get("a").version == "2"
        w.models.get("a").fail(1)  # type: ignore[attr-defined]
        assert w.models.get("a").version == "1"
        assert w.models.serving("a") == ["1"]
        error = refusal(w.models, "a", "2")
        assert (type(error), error.reason) == (Unavailable, "MODEL_QUARANTINED")
        assert error.retry_after_s is not None
        assert 90 < error.retry_after_s <= 100
        assert "10 of its last 20 batches failed (EXECUTION)" in error.message
        assert w.sample("quarantined_total", model="a", version="2") == 1
        assert w.sample("ready", model="a", version="2") == 0
        w.models.get("a").fail()  # type: ignore[attr-defined]
        assert refusal(w.models, "a").reason == "MODEL_QUARANTINED"
        assert not w.models.ready


async def test_a_version_in_quarantine_comes_back_when_it_passes_its_self_test() -> None:
    async with world(quarantine=QUICK) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        served = w.loader.served[0]
        served.fail(3, Fault.HANG)
        assert w.states() == {"a/1": "QUARANTINED"}
        await w.become(a_1="READY")
        assert (served.tested, len(w.loader.served)) == (1, 1)
        assert w.models.get("a") is served
        assert w.sample("ready", model="a", version="1") == 1


async def test_a_version_that_fails_its_self_test_twice_is_loaded_anew() -> None:
    async with world(quarantine=QUICK) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        first = w.loader.served[0]
        first.error = Internal("no", reason="MODEL_EXECUTION_FAILED")
        first.fail()
        await w.become(a_1="READY")
        assert (first.tested, first.closed, len(w.loader.served)) == (2, True, 2)
        assert w.models.get("a") is w.loader.served[1]
        assert w.ledger.used_bytes("cpu") <= CLAIMED


async def test_what_stays_out_says_which_self_test_it_failed() -> None:
    async with world(quarantine={"backoff_s": 0.01, "max_backoff_s": 100.0}) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.served[0].error = ValueError("secret")
        w.loader.served[0].fail()
        await eventually(lambda: "SELF_TEST_FAILED" in refusal(w.models, "a").message)
        assert "secret" not in refusal(w.models, "a").message


async def test_faults_of_what_has_left_take_nothing_out() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        old = w.loader.served[0]
        w.adopt(of(dataclasses.replace(V1, digest="sha256:other")))
        await eventually(lambda: len(w.loader.served) == 2)
        await w.become(a_1="READY")
        old.fail()
        assert w.states() == {"a/1": "READY"}


# --- control by call


async def test_unloading_and_loading_by_call() -> None:
    async with world(repository_control=True, unload_after_s=1000.0) as w:
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="READY", b_2="READY")
        await w.models.unload("a", NEVER)
        assert w.states() == {"b/2": "READY"}
        assert [s.model for s in w.loader.served if s.closed] == ["a"]
        assert w.models.ready
        w.adopt(of(V1), of(V2, name="b"))
        assert isinstance(refusal(w.models, "a"), NotFound)
        await w.models.load("a", NEVER)
        assert w.models.get("a").version == "1"
        await w.models.load("a", 0.0)  # it is there: nothing to do
        for call in (w.models.load, w.models.unload):
            with pytest.raises(NotFound):
                await call("x", NEVER)


async def test_a_model_stays_unloaded_until_the_registry_says_something_new_of_it() -> None:
    async with world(repository_control=True) as w:
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="READY", b_2="READY")
        await w.models.unload("a", NEVER)
        w.adopt(of(V1), of(V2, V3, name="b"))
        await eventually(lambda: w.states().get("b/3") == "READY")
        assert "a/1" not in w.states()
        w.adopt(of(V1, V2), of(V2, V3, name="b"))
        await eventually(lambda: w.states().get("a/2") == "READY")


async def test_load_by_call_fails_with_the_reason_and_tries_at_once_what_had_failed() -> None:
    async with world(repository_control=True, retry_s=1000.0) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="ARTIFACT_CORRUPT")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        with pytest.raises(FailedPrecondition, match="ARTIFACT_CORRUPT"):
            await w.models.load("a", NEVER)
        assert len(w.loader.asked) == 2
        w.loader.errors.clear()
        await w.models.load("a", NEVER)
        assert w.states() == {"a/1": "READY"}


async def test_load_by_call_tells_of_a_load_that_was_already_under_way() -> None:
    async with world(repository_control=True, retry_s=1000.0) as w:
        w.loader.may_load.clear()
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="ARTIFACT_CORRUPT")
        w.adopt(of(V1))
        await w.become(a_1="LOADING")
        call = asyncio.create_task(w.models.load("a", NEVER))
        await asyncio.sleep(0)
        w.loader.may_load.set()
        with pytest.raises(FailedPrecondition, match="ARTIFACT_CORRUPT"):
            await call
        assert len(w.loader.asked) == 1


async def test_load_by_call_says_that_there_is_no_memory() -> None:
    async with world(budget=SIZE, repository_control=True, retry_s=1000.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        with pytest.raises(FailedPrecondition) as refused:
            await w.models.load("a", NEVER)
        assert refused.value.reason == "MEMORY_EXCEEDED"


async def test_load_by_call_tests_what_is_in_quarantine() -> None:
    async with world(repository_control=True, quarantine=SLOW) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.served[0].fail()
        w.loader.served[0].error = Internal("no")
        with pytest.raises(Unavailable) as out:
            await w.models.load("a", NEVER)
        assert out.value.reason == "MODEL_QUARANTINED"
        w.loader.served[0].error = None
        await w.models.load("a", NEVER)
        assert w.states() == {"a/1": "READY"}


async def test_calls_that_run_out_of_time_say_that_it_goes_on() -> None:
    async with world(repository_control=True) as w:
        w.loader.may_load.clear()
        w.adopt(of(V1))
        with pytest.raises(DeadlineExceeded) as late:
            await w.models.load("a", 0.01)
        assert late.value.reason == "MODEL_LOADING"
        w.loader.may_load.set()
        await w.become(a_1="READY")
        w.loader.may_close.clear()
        with pytest.raises(DeadlineExceeded) as late:
            await w.models.unload("a", 0.01)
        assert late.value.reason == "MODEL_UNLOADING"
        w.loader.may_close.set()
        await w.models.unload("a", NEVER)


async def test_a_model_of_which_nothing_is_wanted_is_not_loaded_by_call() -> None:
    async with world(repository_control=True) as w:
        w.adopt(of(V1, policy=VersionPolicy(latest=0)))
        with pytest.raises(NotFound) as refused:
            await w.models.load("a", NEVER)
        assert refused.value.reason == "MODEL_NOT_SERVED"


async def test_control_by_call_is_off_unless_switched_on() -> None:
    async with world() as w:
        w.adopt(of(V1))
        for call in (w.models.load, w.models.unload):
            with pytest.raises(PermissionDenied) as off:
                await call("a", NEVER)
            assert off.value.reason == "REPOSITORY_CONTROL_OFF"


async def test_only_the_models_named_in_the_settings_are_served() -> None:
    async with world(only=("b",)) as w:
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(b_2="READY")
        assert w.loader.asked == ["/m/2"]


# --- the end


async def test_close_during_a_load_serves_nothing_more() -> None:
    async with world() as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.may_load.clear()
        w.adopt(of(V1, V2, champion="1"))
        await w.become(a_1="READY", a_2="LOADING")
        await w.models.close(timeout_s=0.0)
        assert [s.closed for s in w.loader.served] == [True]
        assert w.states() == {}
        w.loader.may_load.set()
        await w.models.close()  # waits for the load
        await eventually(lambda: [p.closed for p in w.loader.prepared] == [False, True])
        assert w.states() == {}
        assert len(w.loader.served) == 1


async def test_a_very_long_name_is_not_repeated_whole() -> None:
    async with world() as w:
        with pytest.raises(NotFound) as refused:
            w.models.get("n" * 10_000, "v" * 10_000)
        assert len(refused.value.message) < 500


async def test_a_version_that_does_not_end_is_given_up_and_keeps_its_memory_until_it_comes_back() -> None:
    async with world(unload_timeout_s=0.01, unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.may_close.clear()
        w.loader.served[0].hangs = True
        w.adopt()
        await eventually(lambda: "leaving=0" in repr(w.models) and w.states() == {})
        assert (w.loader.served[0].closed, w.loader.served[0].abandoned) == (False, True)
        assert w.ledger.used_bytes("cpu") >= SIZE
        w.loader.served[0].came_back.set()
        await eventually(lambda: w.ledger.used_bytes("cpu") == 0)


async def test_a_version_whose_threads_hang_keeps_its_memory_though_it_was_closed() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.served[0].hangs = True
        w.adopt()
        await eventually(lambda: "leaving=0" in repr(w.models) and w.loader.served[0].closed)
        assert w.ledger.used_bytes("cpu") >= SIZE
        assert not w.loader.served[0].abandoned


async def test_a_version_whose_processes_could_be_ended_leaves_nothing_behind() -> None:
    async with world(unload_timeout_s=0.01, unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.may_close.clear()
        w.adopt()
        await eventually(lambda: w.loader.served[0].abandoned and w.ledger.used_bytes("cpu") == 0)


async def test_a_version_that_breaks_while_it_ends_is_gone_and_the_rest_goes_on() -> None:
    async with world(unload_after_s=0.0) as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.served[0].broken = OSError("the lock is gone")
        w.adopt(of(V1, name="b"))
        await w.become(b_1="READY")
        await eventually(lambda: "leaving=0" in repr(w.models) and [claim.name for claim in w.ledger._claims] == [("b", "1")])


async def test_what_is_loaded_and_cannot_be_put_to_work_has_failed_and_leaves_nothing_behind() -> None:
    async with world() as w:
        w.loader.cannot_serve = RuntimeError("can't start new thread")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        assert refusal(w.models, "a").reason == "MODEL_FAILED"
        await eventually(lambda: w.loader.prepared[0].closed and w.ledger.used_bytes("cpu") == 0)
        w.loader.cannot_serve = None
        w.adopt(of(V1), of(V2, name="b"))
        await eventually(lambda: w.states().get("b/2") == "READY")


async def test_a_late_load_does_not_replace_what_serves_even_in_quarantine() -> None:
    async with world(load_timeout_s=0.05, retry_s=0.01) as w:
        w.loader.hang["/m/1"] = threading.Event()
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        slow = w.loader.hang.pop("/m/1")
        await w.become(a_1="READY")
        w.loader.served[0].fail()
        await w.become(a_1="QUARANTINED")
        slow.set()
        await eventually(lambda: len(w.loader.prepared) == 2 and any(p.closed for p in w.loader.prepared))
        assert len(w.loader.served) == 1
        await eventually(lambda: len(w.ledger._claims) == 1)
