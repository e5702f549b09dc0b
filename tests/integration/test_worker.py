"""The model-worker over the wire: the Open Inference Protocol, batching between callers, faults of callers, artifacts and models."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.fakes.registry_world import eventually
from tests.fakes.worker_world import (
    POISON,
    TOKEN,
    WorkerWorld,
    api_key,
    dot_scores,
    infer_request,
    model,
    outputs,
    publish_doubler,
    publish_ranker,
    ranking,
    snapshot,
    worker_world,
)

from model_worker.latency import WINDOW
from model_worker.process_instance import State as ProcessState
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.model_worker.v1 import model_worker_service_pb2 as stream_pb
from plait.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PlaitError,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)
from plait.registry.records import Execution, ModelVersion, Route, Variant

ONE = [1.0, 2.0, 3.0]
ROWS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_ranker(tmp_path_factory.mktemp("ranker") / "1")


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_ranker(tmp_path_factory.mktemp("ranker") / "2", scale=2.0)


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_doubler(tmp_path_factory.mktemp("doubler") / "1")


async def refused(call: Any) -> tuple[PlaitError, grpc.aio.AioRpcError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value), caught.value


async def test_the_protocol_is_spoken(v1: ModelVersion, doubler: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1), model("doubler", doubler))) as w:
        assert (await w.stub.ServerLive(pb.ServerLiveRequest(), metadata=TOKEN)).live
        assert (await w.stub.ServerReady(pb.ServerReadyRequest(), metadata=TOKEN)).ready
        assert (await w.stub.ModelReady(pb.ModelReadyRequest(name="ranker"), metadata=TOKEN)).ready
        assert (await w.stub.ModelReady(pb.ModelReadyRequest(name="ranker", version="1"), metadata=TOKEN)).ready
        server = await w.stub.ServerMetadata(pb.ServerMetadataRequest(), metadata=TOKEN)
        assert (server.name, list(server.extensions)) == (
            "plait-model-worker",
            [
                "classification",
                "logging",
                "model_configuration",
                "model_repository",
                "model_repository(unload_dependents)",
                "schedule_policy",
                "statistics",
                "trace",
            ],
        )
        about = await w.stub.ModelMetadata(pb.ModelMetadataRequest(name="ranker"), metadata=TOKEN)
        assert (about.name, list(about.versions), about.platform) == ("ranker", ["1"], "pytorch_torchscript")
        assert [(t.name, t.datatype, list(t.shape)) for t in about.inputs] == [("user", "FP32", [1, 3]), ("item", "FP32", [-1, 3])]
        assert [(t.name, t.datatype, list(t.shape)) for t in about.outputs] == [("score", "FP32", [-1]), ("rank", "INT64", [-1])]
        assert about.properties["feature_set"] == "home"
        index = await w.stub.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=TOKEN)
        assert [(m.name, m.version, m.state, m.reason) for m in index.models] == [
            ("doubler", "1", "READY", ""),
            ("ranker", "1", "READY", ""),
        ]


@pytest.mark.parametrize("road", ["infer", "stream"])
async def test_a_lone_request_gets_the_models_answer(v1: ModelVersion, doubler: ModelVersion, road: str) -> None:
    async with worker_world(snapshot(model("ranker", v1), model("doubler", doubler))) as w:
        call = getattr(w, road)
        answer = await call(ranking(ONE, ROWS, id="r-7"))
        assert (answer.model_name, answer.model_version, answer.id) == ("ranker", "1", "r-7")
        assert outputs(answer) == {"score": [1, 5], "rank": [0, 1]}
        assert answer.parameters["batch_rows"].int64_param == 2
        assert answer.parameters["compute_us"].int64_param > 0
        assert "queue_us" in answer.parameters
        answer = await call(infer_request("doubler", {"x": np.array([[1, 2]], np.float32)}))
        assert outputs(answer) == {"y": [[2, 4]]}


async def test_typed_requests_are_answered_typed_and_only_with_what_was_asked(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        answer = await w.infer(ranking(ONE, ROWS, typed=True))
        assert [(t.name, list(t.shape)) for t in answer.outputs] == [("score", [2]), ("rank", [2])]
        assert list(answer.outputs[0].contents.fp32_contents) == [1, 5]
        assert list(answer.outputs[1].contents.int64_contents) == [0, 1]
        assert not answer.raw_output_contents
        request = ranking(ONE, ROWS)
        request.outputs.add(name="rank")
        assert outputs(await w.infer(request)) == {"rank": [0, 1]}


async def test_inputs_may_come_in_any_order_and_unknown_parameters_are_ignored(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        request = infer_request("ranker", {"item": np.array(ROWS, np.float32), "user": np.array([ONE], np.float32)})
        request.parameters["sequence_id"].int64_param = 3
        request.inputs[0].parameters["binary_data_size"].int64_param = 24
        assert outputs(await w.infer(request))["score"] == [1, 5]


@pytest.mark.parametrize("road", ["infer", "stream"])
async def test_callers_share_batches_and_each_gets_its_own_answer(v1: ModelVersion, road: str) -> None:
    chance = np.random.default_rng(4)
    async with worker_world(snapshot(model("ranker", v1))) as w:

        async def caller(n: int) -> int:
            most = 0
            for _ in range(8):
                user = [n, int(chance.integers(-9, 9)), 1]
                item = chance.integers(-9, 9, (int(chance.integers(1, 12)), 3))
                answer = await getattr(w, road)(ranking(user, item))
                assert outputs(answer) == {"score": dot_scores(user, item), "rank": list(range(len(item)))}
                most = max(most, answer.parameters["batch_rows"].int64_param - len(item))
            return most

        assert max(await asyncio.gather(*(caller(n) for n in range(64)))) > 0
        assert w.sample("plait_model_worker_queue_seconds_count", model="ranker", version="1") == 64 * 8
        assert w.sample("plait_model_worker_batch_rows_count", model="ranker", version="1") < 64 * 8


async def test_everybody_who_waits_for_the_runner_shares_one_batch(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.stream(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        others = [asyncio.create_task(w.stream(ranking([n, 0, 0], [[1, 0, 0]]))) for n in range(64)]
        await eventually(lambda: _queued_rows(w) == 64)
        w.gate.open()
        assert outputs(await first)["score"] == [1, 5]
        answers = await asyncio.gather(*others)
        assert [outputs(a)["score"] for a in answers] == [[n] for n in range(64)]
        assert {a.parameters["batch_rows"].int64_param for a in answers} == {64}
        assert w.gate.arrived == [2, 64]


async def test_a_request_larger_than_a_batch_runs_in_pieces_where_that_changes_nothing(v1: ModelVersion, doubler: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1), model("doubler", doubler)), batching={"max_rows": 5}) as w:
        x = np.arange(46, dtype=np.float32).reshape(23, 2)
        assert outputs(await w.infer(infer_request("doubler", {"x": x}))) == {"y": (x * 2).tolist()}
        assert w.gate.arrived == [5, 5, 5, 5, 3]
        error, _ = await refused(w.infer(ranking(ONE, ROWS * 3)))  # its ranks would begin anew in each piece
        assert (type(error), error.reason) == (InvalidArgument, "TOO_MANY_ROWS")


async def test_mistakes_of_callers_are_named(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:

        async def fields(request: pb.ModelInferRequest) -> set[str]:
            error, _ = await refused(w.infer(request))
            assert isinstance(error, InvalidArgument)
            assert error.reason == "TENSOR_INVALID"
            with pytest.raises(InvalidArgument) as streamed:
                await w.stream(request)
            assert streamed.value.violations == error.violations
            return {v.field for v in error.violations}

        wrong_dtype = ranking(ONE, ROWS)
        wrong_dtype.inputs[1].datatype = "FP64"
        assert await fields(wrong_dtype) == {"inputs[1].datatype"}
        wrong_shape = ranking(ONE, ROWS)
        wrong_shape.inputs[1].shape[:] = [3, 2]
        assert await fields(wrong_shape) == {"inputs[1].shape"}
        wrong_size = ranking(ONE, ROWS)
        wrong_size.raw_input_contents[1] = b"1234567"
        assert await fields(wrong_size) == {"raw_input_contents[1]"}
        mixed = ranking(ONE, ROWS)
        mixed.inputs[0].contents.fp32_contents.extend(ONE)
        assert await fields(mixed) == {"inputs[0].contents"}
        unknown = ranking(ONE, ROWS)
        unknown.inputs[0].name = "usr"
        assert await fields(unknown) == {"inputs[0].name", "inputs"}
        asked = ranking(ONE, ROWS)
        asked.outputs.add(name="nope")
        assert await fields(asked) == {"outputs[0].name"}
        assert await fields(ranking(ONE, np.zeros((0, 3)))) == {"inputs[1].shape"}
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]


async def test_unknown_models_and_versions(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        for request in (ranking(ONE, ROWS, "nobody"), ranking(ONE, ROWS, version="9")):
            error, _ = await refused(w.infer(request))
            assert isinstance(error, NotFound)
            assert "Request for unknown model" in error.message
            with pytest.raises(NotFound):
                await w.stream(request)
        error, _ = await refused(w.stub.ModelReady(pb.ModelReadyRequest(name="nobody"), metadata=TOKEN))
        assert isinstance(error, NotFound)
        error, _ = await refused(w.stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody"), metadata=TOKEN))
        assert isinstance(error, NotFound)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.pt").write_bytes(content)


def change_the_manifest(folder: Path) -> None:
    file = folder / "model.yaml"
    file.write_text(file.read_text() + "# changed\n")


def lose_the_model(folder: Path) -> None:
    (folder / "model.pt").unlink()


def lose_everything(folder: Path) -> None:
    (folder / "model.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason", "culprit"),
    [
        (flip_a_bit, "ARTIFACT_CORRUPT", "model.pt"),
        (change_the_manifest, "ARTIFACT_CORRUPT", "model.yaml"),
        (lose_the_model, "ARTIFACT_CORRUPT", "model.pt"),
        (lose_everything, "ARTIFACT_MISSING", "model.yaml"),
    ],
)
async def test_a_spoilt_artifact_is_not_served_and_the_others_are(
    v1: ModelVersion, tmp_path: Path, spoil: Any, reason: str, culprit: str
) -> None:
    spoilt = publish_ranker(tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    async with worker_world(snapshot(model("broken", spoilt), model("ranker", v1))) as w:
        error, _ = await refused(w.infer(ranking(ONE, ROWS, "broken")))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "MODEL_FAILED"
        assert reason in error.message
        with pytest.raises(FailedPrecondition):
            await w.stream(ranking(ONE, ROWS, "broken", version="1"))
        assert not (await w.stub.ModelReady(pb.ModelReadyRequest(name="broken"), metadata=TOKEN)).ready
        assert (await w.stub.ServerReady(pb.ServerReadyRequest(), metadata=TOKEN)).ready  # models.ready_when is "any"
        index = await w.stub.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=TOKEN)
        assert [(m.name, m.state) for m in index.models] == [("broken", "UNAVAILABLE"), ("ranker", "READY")]
        assert culprit in index.models[0].reason
        index = await w.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), metadata=TOKEN)
        assert [m.name for m in index.models] == ["ranker"]
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        assert w.sample("plait_model_worker_loads_total", model="broken", outcome=reason) == 1


async def test_a_model_that_fails_its_self_test_is_not_served(tmp_path: Path) -> None:
    wrong = publish_ranker(tmp_path / "wrong", scale=1.0, self_test_scale=1.5)
    async with worker_world(snapshot(model("ranker", wrong))) as w:
        error, _ = await refused(w.infer(ranking(ONE, ROWS)))
        assert (error.reason, "SELF_TEST_FAILED" in error.message) == ("MODEL_FAILED", True)


async def test_what_failed_is_served_once_it_is_mended(tmp_path: Path) -> None:
    version = publish_ranker(tmp_path / "m")
    content = (tmp_path / "m" / "model.pt").read_bytes()
    flip_a_bit(tmp_path / "m")
    async with worker_world(snapshot(model("ranker", version)), models={"retry_s": 0.01, "max_retry_s": 0.05}) as w:
        (tmp_path / "m" / "model.pt").write_bytes(content)
        await eventually(lambda: w.states() == {"ranker/1": "READY"})
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]


async def test_while_a_model_loads_callers_are_told_to_come_back(v1: ModelVersion, v2: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.loader.may_load.clear()
        w.models.adopt(snapshot(model("ranker", v1, v2, champion="1"), revision=2))
        await eventually(lambda: w.states() == {"ranker/1": "READY", "ranker/2": "LOADING"})
        error, _ = await refused(w.infer(ranking(ONE, ROWS, version="2")))
        assert isinstance(error, Unavailable)
        assert error.reason == "MODEL_LOADING"
        assert error.retry_after_s
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        w.loader.may_load.set()
        await eventually(lambda: w.states() == {"ranker/1": "READY", "ranker/2": "READY"})
        assert outputs(await w.infer(ranking(ONE, ROWS, version="2")))["score"] == [2, 10]
        assert outputs(await w.infer(ranking(ONE, ROWS, version="1")))["score"] == [1, 5]


async def test_a_full_queue_says_when_to_come_back(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1)), batching={"max_rows": 4, "max_queue_rows": 4}) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        queued = asyncio.create_task(w.infer(ranking(ONE, ROWS * 2)))
        await eventually(lambda: _queued_rows(w) == 4)
        error, wire = await refused(w.infer(ranking(ONE, ROWS)))
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "QUEUE_FULL"
        assert error.retry_after_s
        assert dict(wire.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "-1"
        with pytest.raises(ResourceExhausted):
            await w.stream(ranking(ONE, ROWS))
        error, _ = await refused(w.infer(ranking(ONE, ROWS * 3)))
        assert (type(error), error.reason) == (InvalidArgument, "TOO_MANY_ROWS")
        w.gate.open()
        assert outputs(await first)["score"] == [1, 5]
        assert outputs(await queued)["score"] == [1, 5, 1, 5]


async def test_a_deadline_that_passed_or_cannot_be_met_is_refused_before_the_model_runs(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        schedule = w.models.get("ranker").batcher._schedule
        for rows in range(1, WINDOW + 1):  # batches that took a second per row, as if they had ended just now
            schedule.latency.observe(rows, 1.0 * rows, time.monotonic() + 3600)
        error, _ = await refused(w.infer(ranking(ONE, ROWS), timeout_s=1.0))
        assert isinstance(error, DeadlineExceeded)
        assert error.reason == "DEADLINE_CANNOT_BE_MET"
        with pytest.raises(DeadlineExceeded) as streamed:
            await w.stream(ranking(ONE, ROWS), timeout_s=1.0)
        assert streamed.value.reason == "DEADLINE_CANNOT_BE_MET"
        assert w.gate.arrived == []


async def test_what_expires_in_the_queue_never_runs(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        error, _ = await refused(w.infer(ranking(ONE, [[7.0, 0.0, 0.0]]), timeout_s=0.05))
        assert isinstance(error, DeadlineExceeded)
        with pytest.raises(DeadlineExceeded):
            await w.stream(ranking(ONE, [[7.0, 0.0, 0.0]]), timeout_s=0.05)
        w.gate.open()
        await first
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        assert w.gate.arrived == [2, 2]


async def test_who_goes_away_while_queued_takes_its_rows_along(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        gone = [asyncio.create_task(w.stream(ranking(ONE, ROWS * 4))), asyncio.create_task(w.infer(ranking(ONE, ROWS * 4)))]
        stays = asyncio.create_task(w.stream(ranking(ONE, ROWS)))
        await eventually(lambda: _queued_rows(w) == 18)
        for task in gone:
            task.cancel()
        await eventually(lambda: _queued_rows(w) == 2)
        w.gate.open()
        assert outputs(await first)["score"] == [1, 5]
        assert outputs(await stays)["score"] == [1, 5]
        assert w.gate.arrived == [2, 2]
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*gone, return_exceptions=True))


async def test_who_goes_away_inside_a_batch_disturbs_nobody(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        gone, stays = [asyncio.create_task(w.stream(ranking([n, 0, 0], [[1, 0, 0]]))) for n in (5, 6)]
        await eventually(lambda: _queued_rows(w) == 2)
        first.cancel()  # inside the batch that runs
        await asyncio.gather(first, return_exceptions=True)
        w.gate.open()
        assert outputs(await stays)["score"] == [6]
        assert outputs(await gone)["score"] == [5]
        w.gate.close()
        gone, stays = [asyncio.create_task(w.stream(ranking([n, 0, 0], [[1, 0, 0]]))) for n in (7, 8)]
        await eventually(lambda: len(w.gate.arrived) == 3)
        gone.cancel()
        w.gate.open()
        assert outputs(await stays)["score"] == [8]


async def test_a_request_the_model_fails_on_fails_alone(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        tasks = [asyncio.create_task(w.stream(ranking([n, 0, 0], [[POISON if n == 5 else 1.0, 0, 0]]))) for n in range(8)]
        await eventually(lambda: _queued_rows(w) == 8)
        w.gate.open()
        await first
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        failed = answers.pop(5)
        assert isinstance(failed, Internal)
        assert failed.reason == "MODEL_EXECUTION_FAILED"
        assert "poison" not in failed.message
        assert [outputs(a)["score"] for a in answers] == [[n] for n in range(8) if n != 5]  # type: ignore[arg-type]
        assert w.gate.arrived == [2, 8, 4, 4, 2, 1, 1, 2]
        error, _ = await refused(w.infer(ranking(ONE, [[POISON, 0, 0]])))
        assert isinstance(error, Internal)


async def test_versions_are_swapped_under_load_without_a_failed_request(v1: ModelVersion, v2: ModelVersion) -> None:
    one = snapshot(model("ranker", v1, champion="1"))
    two = snapshot(model("ranker", v1, v2, champion="2"), revision=2)
    async with worker_world(one, models={"unload_after_s": 0.2}) as w:
        stop = asyncio.Event()
        seen: list[str] = []

        async def caller(road: Any) -> None:
            while not stop.is_set():
                answer = await road(ranking(ONE, ROWS))
                assert outputs(answer)["score"] == ([1, 5] if answer.model_version == "1" else [2, 10])
                seen.append(answer.model_version)

        callers = [asyncio.create_task(caller(road)) for road in (w.infer, w.stream) for _ in range(4)]
        await eventually(lambda: len(seen) > 20)
        w.models.adopt(two)
        await eventually(lambda: w.states() == {"ranker/2": "READY"})
        after = len(seen)
        await eventually(lambda: len(seen) > after + 20)
        stop.set()
        await asyncio.gather(*callers)
        assert seen[0] == "1"
        assert set(seen[after + 8 :]) == {"2"}
        error, _ = await refused(w.infer(ranking(ONE, ROWS, version="1")))
        assert isinstance(error, NotFound)
        assert error.reason == "MODEL_NOT_SERVED"
        assert w.metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "ranker", "version": "1"}) is None


async def test_the_old_version_stays_while_the_new_one_cannot_be_served(v1: ModelVersion, tmp_path: Path) -> None:
    broken = publish_ranker(tmp_path / "broken")
    flip_a_bit(tmp_path / "broken")
    async with worker_world(snapshot(model("ranker", v1, champion="1")), models={"unload_after_s": 0.0}) as w:
        w.models.adopt(snapshot(model("ranker", v1, broken, champion="2"), revision=2))
        await eventually(lambda: w.states() == {"ranker/1": "READY", "ranker/2": "FAILED"})
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        error, _ = await refused(w.infer(ranking(ONE, ROWS, version="2")))
        assert error.reason == "MODEL_FAILED"


async def test_every_version_a_route_or_an_alias_refers_to_is_served(v1: ModelVersion, v2: ModelVersion) -> None:
    route = Route(name="home", variants=(Variant(name="a", model="ranker", use="1"), Variant(name="b", model="ranker", use="shadow")))
    async with worker_world(snapshot(model("ranker", v1, v2, v1, shadow="2"), routes={"home": route})) as w:
        assert w.states() == {"ranker/1": "READY", "ranker/2": "READY", "ranker/3": "READY"}
        assert (await w.infer(ranking(ONE, ROWS))).model_version == "3"


async def test_models_are_loaded_and_unloaded_by_call_only_where_that_is_allowed(v1: ModelVersion) -> None:
    load, unload = pb.RepositoryModelLoadRequest(repository_name="ranker"), pb.RepositoryModelUnloadRequest(model_name="ranker")
    async with worker_world(snapshot(model("ranker", v1))) as w:
        for method, request in ((w.stub.RepositoryModelLoad, load), (w.stub.RepositoryModelUnload, unload)):
            error, _ = await refused(method(request, metadata=TOKEN))
            assert isinstance(error, PermissionDenied)
            assert error.reason == "REPOSITORY_CONTROL_OFF"
    async with worker_world(snapshot(model("ranker", v1)), models={"repository_control": True}) as w:
        await w.stub.RepositoryModelUnload(unload, metadata=TOKEN)
        assert w.states() == {}
        error, _ = await refused(w.infer(ranking(ONE, ROWS)))
        assert isinstance(error, NotFound)
        await w.stub.RepositoryModelLoad(load, metadata=TOKEN)
        assert w.states() == {"ranker/1": "READY"}
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]
        error, _ = await refused(w.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nobody"), metadata=TOKEN))
        assert isinstance(error, NotFound)


async def test_only_those_with_the_scope_are_let_in_and_streams_are_for_services(v1: ModelVersion) -> None:
    keys = [api_key("plait_infer", "infer"), api_key("plait_rank", "rank")]
    async with worker_world(snapshot(model("ranker", v1), keys={k.sha256: k for k in keys})) as w:
        bearer = (("authorization", "Bearer plait_infer"),)
        assert outputs(await w.infer(ranking(ONE, ROWS), metadata=bearer))["score"] == [1, 5]
        error, _ = await refused(w.infer(ranking(ONE, ROWS), metadata=()))
        assert isinstance(error, Unauthenticated)
        error, _ = await refused(w.infer(ranking(ONE, ROWS), metadata=(("x-api-key", "plait_rank"),)))
        assert (type(error), error.reason) == (PermissionDenied, "SCOPE_MISSING")
        stream = w.stream_stub.StreamInfer(metadata=bearer)
        await stream.write(stream_pb.StreamInferRequest(request=ranking(ONE, ROWS)))
        error, _ = await refused(stream.read())
        assert (type(error), error.reason) == (PermissionDenied, "SERVICE_TOKEN_MISSING")


async def test_answers_on_a_stream_say_how_loaded_the_worker_is(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        stream = w.stream_stub.StreamInfer(metadata=TOKEN)
        loads = []
        for call_id in range(1, 40):
            frame = stream_pb.StreamInferRequest(request=ranking(ONE, ROWS))
            frame.call.call_id = call_id
            await stream.write(frame)
            answer = await stream.read()
            assert outputs(answer.response)["score"] == [1, 5]
            loads += [answer.load] if answer.HasField("load") else []
        assert loads[0].in_flight == 0
        assert loads[0].row_ns > 0
        assert not loads[0].draining
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


async def test_what_is_held_is_answered_before_the_worker_ends(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        held = [asyncio.create_task(road(ranking(ONE, ROWS))) for road in (w.infer, w.stream)]
        await eventually(lambda: sum(w.gate.arrived) + _queued_rows(w) == 4)
        draining = asyncio.create_task(w.server.drain())
        closing = asyncio.create_task(w.models.close())
        await asyncio.sleep(0)
        w.gate.open()
        assert [outputs(a)["score"] for a in await asyncio.gather(*held)] == [[1, 5]] * 2
        await asyncio.gather(draining, closing)
        assert w.states() == {}


def _queued_rows(w: WorkerWorld) -> int:
    return w.models.get("ranker").batcher._schedule.queued_rows


async def test_a_model_that_fails_on_everything_is_taken_out_and_tested_back(v1: ModelVersion) -> None:
    quarantine = {"backoff_s": 0.2, "max_backoff_s": 0.2}
    async with worker_world(snapshot(model("ranker", v1)), models={"quarantine": quarantine}) as w:
        for _ in range(10):
            error, _ = await refused(w.infer(ranking(ONE, [[POISON, 0, 0]])))
            assert isinstance(error, Internal)
        error, _ = await refused(w.infer(ranking(ONE, ROWS)))
        assert (type(error), error.reason) == (Unavailable, "MODEL_QUARANTINED")
        assert error.retry_after_s
        await eventually(lambda: w.states() == {"ranker/1": "READY"})
        assert outputs(await w.infer(ranking(ONE, ROWS)))["score"] == [1, 5]


async def test_a_process_instance_that_is_killed_is_survived_by_the_others(tmp_path: Path) -> None:
    version = publish_ranker(tmp_path / "m", execution=Execution(instances=2, kind="process"))
    async with worker_world(snapshot(model("ranker", version))) as w:
        served = w.models.get("ranker")
        children = [psutil.Process(pid) for m in served.prepared.models if (pid := m.pid) is not None]
        assert len(children) == 2
        assert {child.ppid() for child in children} == {os.getpid()}
        request = ranking([1, 2, 3], [[1, 0, 0], [0, 1, 0]])
        assert outputs(await w.infer(request))["score"] == [1, 2]

        async def calls(count: int) -> list[Any]:
            return [await w.infer(request) for _ in range(count)]

        load = [asyncio.create_task(calls(100)) for _ in range(4)]
        await w.infer(request)
        children[0].send_signal(signal.SIGKILL)
        answers = [a for part in await asyncio.gather(*load) for a in part]
        assert len(answers) == 400
        assert all(outputs(a)["score"] == [1, 2] for a in answers)
        await eventually(lambda: all(m.pid is not None and m.state is ProcessState.READY for m in served.prepared.models), 60)
        children += [psutil.Process(m.pid) for m in served.prepared.models]
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


async def test_answers_carry_what_they_cost_and_how_loaded_the_worker_is(tmp_path: Path) -> None:
    async with worker_world(snapshot(model("ranker", publish_ranker(tmp_path / "m")))) as w:
        call = w.stub.ModelInfer(ranking([1, 2, 3], [[1, 0, 0], [0, 1, 0]]), metadata=TOKEN, timeout=20)
        await call
        trailers = dict(await call.trailing_metadata())
        assert trailers["plait-model-version"] == "1"
        assert int(trailers["plait-batch-rows"]) == 2
        assert int(trailers["plait-compute-us"]) >= 0
        assert int(trailers["plait-queue-us"]) >= 0
        assert b"endpoint-load-metrics-bin" in await _raw_answer(w.server.address)  # gRPC's own client keeps it for its balancer
        assert w.sample("nv_inference_request_success", model="ranker", version="1") == 2
        with pytest.raises(grpc.aio.AioRpcError):
            await w.infer(ranking([1, 2, 3], [[POISON, 0, 0]]))
        failures = {"model": "ranker", "version": "1", "reason": "MODEL_EXECUTION_FAILED"}
        assert w.sample("plait_model_worker_request_failures_total", **failures) == 1


async def _raw_answer(address: str) -> bytes:
    """Call ModelInfer in bare HTTP/2 and return every byte of the answer: headers are written literally, so names can be read."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def header(name: str, value: str) -> bytes:
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    headers = {
        ":method": "POST", ":scheme": "http", ":path": "/inference.GRPCInferenceService/ModelInfer", ":authority": address,
        "content-type": "application/grpc", "te": "trailers", TOKEN[0][0]: TOKEN[0][1],
    }  # fmt: skip
    message = ranking([1, 2, 3], [[1, 0, 0]]).SerializeToString()
    body = b"\x00" + len(message).to_bytes(4, "big") + message
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    writer.write(frame(1, 4, 1, b"".join(header(k, v) for k, v in headers.items())) + frame(0, 1, 1, body))
    seen = b""
    while b"grpc-status" not in seen or b"plait-batch-rows" not in seen:
        seen += await asyncio.wait_for(reader.read(65536), 10)
    writer.close()
    await writer.wait_closed()
    return seen
