"""The wire work: what is told of models in each state. (What needs a wire is in tests/integration/test_worker.py.)"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from model_worker.batcher import Answer
from model_worker.controls import Controls
from model_worker.lifecycle import Entry, State
from model_worker.load_report import StreamLoad
from model_worker.servicer import InferenceServicer, StreamServicer
from model_worker.settings import ProtocolSettings
from model_worker.statistics import Statistics
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PlaitError, Unavailable, Unimplemented
from plait.registry.records import ModelVersion
from plait.rpc.call import Call, current, enter
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

    def not_held(self) -> list[tuple[str, str, str]]:
        return [("d", "UNAVAILABLE", "unloaded")]

    async def load(self, model: str, timeout_s: float) -> None:
        self.told.append(("load", model, timeout_s))

    async def unload(self, model: str, timeout_s: float) -> None:
        self.told.append(("unload", model, timeout_s))


def servicer(models: StubModels) -> InferenceServicer:
    return InferenceServicer(
        models,  # type: ignore[arg-type]
        SimpleNamespace(infer=_refuse),  # type: ignore[arg-type]
        Statistics(),
        Controls(ProtocolSettings(), off()),
        version="1.2",
        max_in_flight=2,
        default_timeout_s=5.0,
        tracing=off(),
    )


async def _refuse(request: Any, response: Any, watched: bool = False) -> Answer:
    """Fill a part of the response, note how much time there was, and fail or answer as the request's id says."""
    response.model_name = "m"
    if request.id == "left":
        raise InvalidArgument(f"{current().deadline.remaining_s():.0f}")
    if request.id == "fault":
        raise ZeroDivisionError
    response.id = request.id
    return Answer(outputs=(), queue_s=0.0, compute_s=0.0, batch_rows=1)


class StreamContext:
    """A stream's context: has so much time, remembers what was written."""

    def __init__(self, left_s: float | None, metadata: Any) -> None:
        self._left_s = left_s
        self.metadata = metadata
        self.written: list[Any] = []

    def invocation_metadata(self) -> Any:
        return self.metadata

    def time_remaining(self) -> float | None:
        return self._left_s

    async def write(self, message: Any) -> None:
        self.written.append(message)


async def streamed(left_s: float | None, *ids: str, metadata: Any = ()) -> list[Any]:
    async def requests() -> AsyncIterator[Any]:
        for request_id in ids:
            yield pb.ModelInferRequest(id=request_id)

    enter(Call(method="m", tenant="t", deadline=Deadline.after(1.0 if left_s is None else left_s)))
    context = StreamContext(left_s, metadata)
    await servicer(StubModels()).ModelStreamInfer(requests(), context)
    return context.written


async def test_a_failed_request_of_a_stream_is_answered_with_its_id_and_the_stream_goes_on() -> None:
    first, fault, last = await streamed(None, "a", "fault", "b")
    for answer, request_id in ((first, "a"), (last, "b")):
        assert (answer.error_message, answer.infer_response.id) == ("", request_id)
        assert answer.infer_response.parameters["triton_final_response"].bool_param
    assert "a fault inside plait" in fault.error_message
    assert fault.infer_response == pb.ModelInferResponse(id="fault")


@pytest.mark.parametrize(("left_s", "expected"), [(None, "5"), (60.0, "5"), (3.0, "3")])
async def test_a_request_of_a_stream_has_the_default_time_and_never_more_than_the_stream(left_s: float | None, expected: str) -> None:
    [answer] = await streamed(left_s, "left")
    assert answer.error_message == expected


async def test_who_asks_for_it_gets_the_status_of_a_failed_request_and_no_more() -> None:
    with pytest.raises(InvalidArgument):
        await streamed(None, "left", "a", metadata=(("triton_grpc_error", "true"),))


@pytest.mark.parametrize("kind", ["System", "Cuda"])
@pytest.mark.parametrize("what", ["Status", "Register", "Unregister"])
async def test_shared_memory_is_not_offered(kind: str, what: str) -> None:
    with pytest.raises(Unimplemented) as refused:
        await getattr(servicer(StubModels()), f"{kind}SharedMemory{what}")(None, None)
    assert refused.value.reason == "SHARED_MEMORY_NOT_OFFERED"


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
        ("d", "", "UNAVAILABLE", "unloaded"),
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


async def test_a_model_is_loaded_as_the_registry_has_it() -> None:
    models = StubModels()
    enter(Call(method="m", tenant="t", deadline=Deadline.never()))
    request = pb.RepositoryModelLoadRequest(model_name="a")
    request.parameters["config"].string_param = "{}"
    with pytest.raises(InvalidArgument):
        await servicer(models).RepositoryModelLoad(request, None)
    assert models.told == []
    unload = pb.RepositoryModelUnloadRequest(model_name="a")
    unload.parameters["unload_dependents"].bool_param = False  # tritonclient always says so
    await servicer(models).RepositoryModelUnload(unload, None)
    assert models.told == [("unload", "a", math.inf)]


@pytest.mark.parametrize(("name", "kind", "value"), [("unload_dependents", "int64_param", 1), ("force", "bool_param", True)])
async def test_unloading_takes_no_other_parameters(name: str, kind: str, value: Any) -> None:
    models = StubModels()
    request = pb.RepositoryModelUnloadRequest(model_name="a")
    setattr(request.parameters[name], kind, value)
    with pytest.raises(InvalidArgument) as refused:
        await servicer(models).RepositoryModelUnload(request, None)
    assert refused.value.reason == "UNLOAD_PARAMETERS"
    assert models.told == []


async def test_streams_are_for_services() -> None:
    enter(Call(method="m", tenant="t", deadline=Deadline.never()))
    load = StreamLoad(lambda: 0, lambda: False)
    servicer = StreamServicer(SimpleNamespace(infer=_refuse), max_in_flight=1, tracing=off(), stream_load=load)  # type: ignore[arg-type]
    with pytest.raises(PermissionDenied):
        await servicer.StreamInfer(iter(()), None)  # type: ignore[arg-type]


async def test_the_server_says_what_it_is() -> None:
    answer = await servicer(StubModels()).ServerMetadata(pb.ServerMetadataRequest(), None)
    assert (answer.name, answer.version) == ("plait-model-worker", "1.2")
    assert "schedule_policy" in answer.extensions
    assert not {"sequence", "parameters", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data"} & set(answer.extensions)
    assert (await servicer(StubModels()).ServerLive(pb.ServerLiveRequest(), None)).live
