"""The wire work: what is told of models in each state. (What needs a wire is in tests/integration/test_worker.py.)"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from model_worker.lifecycle import Entry, State
from model_worker.servicer import InferenceServicer, StreamServicer
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import FailedPrecondition, NotFound, PermissionDenied, PlaitError, Unavailable
from plait.registry.records import ModelVersion
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline
from plait.telemetry.tracing import off


class StubModels:
    """Models of which `get` raises `error`, and that remember what they were told."""

    def __init__(self, error: PlaitError | None = None) -> None:
        self.error = error
        self.ready = error is None
        self.told: list[tuple[str, str, float]] = []

    def get(self, model: str, version: str) -> Any:
        if self.error is not None:
            raise self.error

    def entries(self) -> list[tuple[str, Entry]]:
        versions = [ModelVersion(version=v, artifact="/m") for v in "123"]
        return [
            ("a", Entry(version=versions[0], state=State.READY)),
            ("a", Entry(version=versions[1], state=State.LOADING)),
            ("b", Entry(version=versions[2], state=State.FAILED, error=FailedPrecondition("two files differ"))),
            ("c", Entry(version=versions[2], state=State.QUARANTINED, error=Unavailable("it keeps failing"))),
        ]

    async def load(self, model: str, timeout_s: float) -> None:
        self.told.append(("load", model, timeout_s))

    async def unload(self, model: str, timeout_s: float) -> None:
        self.told.append(("unload", model, timeout_s))


def servicer(models: StubModels) -> InferenceServicer:
    return InferenceServicer(models, SimpleNamespace(), version="1.2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "ready"), [(None, True), (Unavailable("loading"), False), (FailedPrecondition("failed"), False)])
async def test_a_model_is_ready_or_not(error: PlaitError | None, ready: bool) -> None:
    models = StubModels(error)
    assert (await servicer(models).ModelReady(pb.ModelReadyRequest(name="a"), None)).ready is ready
    assert (await servicer(models).ServerReady(pb.ServerReadyRequest(), None)).ready is ready


async def test_an_unknown_model_is_neither() -> None:
    with pytest.raises(NotFound):
        await servicer(StubModels(NotFound("no"))).ModelReady(pb.ModelReadyRequest(name="x"), None)


async def test_the_index_says_where_each_version_stands() -> None:
    index = await servicer(StubModels()).RepositoryIndex(pb.RepositoryIndexRequest(), None)
    assert [(m.name, m.version, m.state, m.reason) for m in index.models] == [
        ("a", "1", "READY", ""),
        ("a", "2", "LOADING", ""),
        ("b", "3", "UNAVAILABLE", "two files differ"),
        ("c", "3", "UNAVAILABLE", "it keeps failing"),
    ]
    index = await servicer(StubModels()).RepositoryIndex(pb.RepositoryIndexRequest(ready=True), None)
    assert [(m.name, m.version) for m in index.models] == [("a", "1")]


async def test_the_models_name_may_come_in_either_field() -> None:
    enter(Call(method="m", tenant="t", deadline=Deadline.never()))
    models = StubModels()
    for request in (pb.RepositoryModelLoadRequest(repository_name="kserve"), pb.RepositoryModelLoadRequest(model_name="triton")):
        await servicer(models).RepositoryModelLoad(request, None)
    await servicer(models).RepositoryModelUnload(pb.RepositoryModelUnloadRequest(repository_name="r", model_name="triton"), None)
    assert models.told == [("load", "kserve", math.inf), ("load", "triton", math.inf), ("unload", "triton", math.inf)]


async def test_streams_are_for_services() -> None:
    enter(Call(method="m", tenant="t", deadline=Deadline.never()))
    with pytest.raises(PermissionDenied):
        await StreamServicer(SimpleNamespace(), max_in_flight=1, tracing=off()).StreamInfer(iter(()), None)  # type: ignore[arg-type]


async def test_the_server_says_what_it_is() -> None:
    answer = await servicer(StubModels()).ServerMetadata(pb.ServerMetadataRequest(), None)
    assert (answer.name, answer.version) == ("plait-model-worker", "1.2")
    assert (await servicer(StubModels()).ServerLive(pb.ServerLiveRequest(), None)).live
