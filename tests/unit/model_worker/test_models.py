"""Following the registry, with a loader that succeeds, fails and waits on order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.fakes.registry_world import eventually

from model_worker.instruments import Instruments
from model_worker.models import Models
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable, Violation
from plait.registry.records import Model, ModelVersion, Snapshot, VersionPolicy
from plait.telemetry.metrics import Metrics

V1, V2 = (ModelVersion(version=v, artifact=f"/m/{v}", digest=f"sha256:{v}") for v in "12")


@dataclass
class FakeServed:
    """A model that serves until it was closed; `may_close` lets it."""

    model: str
    version: str
    digest: str
    may_close: asyncio.Event
    closed: bool = False

    async def close(self) -> None:
        await self.may_close.wait()
        self.closed = True


@dataclass
class FakePrepared:
    digest: str
    proven: str = "proven"


@dataclass
class FakeLoader:
    """Loads anything but what `errors` names by "artifact"; waits for `may_load`; notes what it was asked for."""

    errors: dict[str, Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    served: list[FakeServed] = field(default_factory=list)
    may_load: threading.Event = field(default_factory=threading.Event)
    may_close: asyncio.Event = field(default_factory=asyncio.Event)

    def prepare(self, version: ModelVersion) -> FakePrepared:
        self.asked.append(version.artifact)
        assert self.may_load.wait(30)
        if version.artifact in self.errors:
            raise self.errors[version.artifact]
        return FakePrepared(version.digest)

    def serve(self, model: str, version: str, prepared: FakePrepared) -> FakeServed:
        self.served.append(FakeServed(model, version, prepared.digest, self.may_close))
        return self.served[-1]


class World:
    def __init__(self, models: Models, loader: FakeLoader, metrics: Metrics) -> None:
        self.models = models
        self.loader = loader
        self.metrics = metrics
        self.revision = 0

    def adopt(self, *models: Model) -> None:
        self.revision += 1
        self.models.adopt(Snapshot(revision=self.revision, models={m.name: m for m in models}))

    def states(self) -> dict[str, str]:
        return {f"{name}/{entry.version.version}": entry.state.name for name, entry in self.models.entries()}

    async def become(self, **states: str) -> None:
        await eventually(lambda: self.states() == {name.replace("_", "/"): state for name, state in states.items()})


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    metrics, loader = Metrics(), FakeLoader()
    loader.may_load.set()
    loader.may_close.set()
    models = Models(ModelSettings(**settings), loader, Instruments(metrics))  # type: ignore[arg-type]
    follower = asyncio.create_task(models.run())
    try:
        yield World(models, loader, metrics)
    finally:
        loader.may_load.set()
        loader.may_close.set()
        await models.close()
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)


def of(*versions: ModelVersion, name: str = "a", **aliases: str) -> Model:
    return Model(name=name, versions=versions, aliases=aliases)


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
        assert w.metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "b", "version": "2"}) == 1
        assert w.metrics.registry.get_sample_value("plait_model_worker_loads_total", {"model": "b", "outcome": "READY"}) == 2


async def test_while_it_loads_callers_are_told_to_come_back() -> None:
    async with world() as w:
        w.loader.may_load.clear()
        w.adopt(of(V1))
        for version in ("", "1"):
            with pytest.raises(Unavailable) as loading:
                w.models.get("a", version)
            assert loading.value.reason == "MODEL_LOADING"
            assert loading.value.retry_after_s
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
        with pytest.raises(FailedPrecondition) as failed:
            w.models.get("a")
        assert failed.value.reason == "MODEL_FAILED"
        assert failed.value.message == "a could not be loaded: two files differ: model.pt: gone (ARTIFACT_CORRUPT)"
        assert w.models.get("b").version == "2"
        assert w.metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "a", "version": "1"}) == 0


async def test_an_unforeseen_error_is_logged_and_not_told() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = ZeroDivisionError("secret")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        with pytest.raises(FailedPrecondition) as failed:
            w.models.get("a", "1")
        assert "ZeroDivisionError" in failed.value.message
        assert "secret" not in failed.value.message


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
        with pytest.raises(FailedPrecondition):
            w.models.get("a")


async def test_one_version_that_failed_does_not_hide_that_another_is_coming() -> None:
    async with world() as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.loader.may_load.clear()
        w.adopt(of(V1, V2, old="1"))
        await w.become(a_1="FAILED", a_2="LOADING")
        with pytest.raises(Unavailable):
            w.models.get("a")


async def test_unknown_and_unserved_are_told_apart() -> None:
    async with world() as w:
        w.adopt(of(V1, V2))
        await w.become(a_2="READY")
        for model, version, reason in (("x", "", "MODEL_NOT_FOUND"), ("a", "9", "MODEL_NOT_FOUND"), ("a", "1", "MODEL_NOT_SERVED")):
            with pytest.raises(NotFound, match="Request for unknown model") as unknown:
                w.models.get(model, version)
            assert unknown.value.reason == reason


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
        with pytest.raises(NotFound):
            w.models.get("a", "1")
        w.loader.may_close.set()
        await eventually(lambda: old.closed)
        assert not new.closed
        await eventually(lambda: w.metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "a", "version": "1"}) is None)


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
        assert w.metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "a", "version": "1"}) == 1


async def test_pausing_and_resuming_by_call() -> None:
    async with world(repository_control=True, unload_after_s=1000.0) as w:
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(a_1="READY", b_2="READY")
        w.models.pause("a")
        await w.become(b_2="READY")
        assert w.models.ready
        w.adopt(of(V1), of(V2, name="b"))
        with pytest.raises(NotFound):
            w.models.get("a")
        w.models.resume("a")
        await w.become(a_1="READY", b_2="READY")
        for call in (w.models.pause, w.models.resume):
            with pytest.raises(NotFound):
                call("x")


async def test_resume_tries_at_once_what_failed() -> None:
    async with world(repository_control=True, retry_s=1000.0) as w:
        w.loader.errors["/m/1"] = FailedPrecondition("no", reason="NO")
        w.adopt(of(V1))
        await w.become(a_1="FAILED")
        w.loader.errors.clear()
        w.models.resume("a")
        await w.become(a_1="READY")


async def test_control_by_call_is_off_unless_switched_on() -> None:
    async with world() as w:
        w.adopt(of(V1))
        for call in (w.models.pause, w.models.resume):
            with pytest.raises(PermissionDenied) as off:
                call("a")
            assert off.value.reason == "REPOSITORY_CONTROL_OFF"


async def test_only_the_models_named_in_the_settings_are_served() -> None:
    async with world(only=("b",)) as w:
        w.adopt(of(V1), of(V2, name="b"))
        await w.become(b_2="READY")
        assert w.loader.asked == ["/m/2"]


async def test_close_during_a_load_serves_nothing_more() -> None:
    async with world() as w:
        w.adopt(of(V1))
        await w.become(a_1="READY")
        w.loader.may_load.clear()
        w.adopt(of(V1, V2, champion="1"))
        await w.become(a_1="READY", a_2="LOADING")
        await w.models.close()
        assert [s.closed for s in w.loader.served] == [True]
        assert w.states() == {}
        w.loader.may_load.set()
        await asyncio.sleep(0)
        assert w.states() == {}
        assert len(w.loader.served) == 1


async def test_a_very_long_name_is_not_repeated_whole() -> None:
    async with world() as w:
        with pytest.raises(NotFound) as refused:
            w.models.get("n" * 10_000, "v" * 10_000)
        assert len(refused.value.message) < 500
