"""ModelStreamInfer and the control calls over a wire: side by side, in order, cancelled, drained, guarded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.fakes.registry_world import eventually
from tests.fakes.worker_world import TOKEN, WorkerWorld, model, outputs, publish_ranker, ranking, snapshot, worker_world

from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import NotFound, PermissionDenied, from_rpc_error
from plait.registry.records import ModelVersion
from plait.rpc.channel import open_channel
from plait.settings import ChannelSettings

ONE = [1.0, 2.0, 3.0]
ROWS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_ranker(tmp_path_factory.mktemp("ranker") / "1")


@pytest.fixture
def _log_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


async def read(stream: Any, count: int) -> list[Any]:
    return [await stream.read() for _ in range(count)]


async def test_requests_of_a_stream_share_batches_and_keep_their_order(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        stream = w.stub.ModelStreamInfer(metadata=TOKEN)
        for n in range(20):
            await stream.write(ranking([n, 0, 0], [[1, 0, 0]], id=f"r{n}", model_name="none" if n == 5 else "ranker"))
        await eventually(lambda: sum(w.gate.arrived) + _queued_rows(w) == 19)
        w.gate.open()
        await stream.done_writing()
        answers = await read(stream, 20)
        assert await stream.read() is grpc.aio.EOF
        assert [a.infer_response.id for a in answers] == [f"r{n}" for n in range(20)]
        assert [n for n, a in enumerate(answers) if a.error_message] == [5]
        assert [outputs(a.infer_response)["score"] for n, a in enumerate(answers) if n != 5] == [[n] for n in range(20) if n != 5]
        assert len(w.gate.arrived) < 19
        assert await stream.code() is grpc.StatusCode.OK


async def test_what_is_advertised_as_schedule_policy_is_kept(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1)), batching={"max_rows": 5}) as w:
        extensions = (await w.stub.ServerMetadata(pb.ServerMetadataRequest(), metadata=TOKEN)).extensions
        assert "schedule_policy" in extensions
        w.gate.close()
        calls = [asyncio.create_task(w.infer(ranking(ONE, ROWS)))]
        await eventually(lambda: w.gate.arrived == [2])
        waiting = 0
        for rows, priority in ((3, 2), (4, 0), (5, 1)):  # no two of them fit a batch
            request = ranking(ONE, [[1.0, 0.0, 0.0]] * rows)
            request.parameters["priority"].int64_param = priority
            calls.append(asyncio.create_task(w.infer(request)))
            waiting += rows
            await eventually(lambda waiting=waiting: _queued_rows(w) == waiting)  # type: ignore[misc]
        impatient = ranking(ONE, ROWS)
        impatient.parameters["timeout"].int64_param = 1  # microseconds
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await w.infer(impatient)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        w.gate.open()
        await asyncio.gather(*calls)
        assert w.gate.arrived == [2, 5, 4, 3]


async def test_a_client_that_goes_away_takes_its_rows_along(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        first = asyncio.create_task(w.infer(ranking(ONE, ROWS)))
        await eventually(lambda: w.gate.arrived == [2])
        stream = w.stub.ModelStreamInfer(metadata=TOKEN)
        for _ in range(3):
            await stream.write(ranking(ONE, ROWS))
        await eventually(lambda: _queued_rows(w) == 6)
        stream.cancel()
        await eventually(lambda: _queued_rows(w) == 0)
        w.gate.open()
        assert outputs(await first)["score"] == [1, 5]
        counters = w.models._instruments.statistics.of("ranker", "1")
        assert (counters.success.count, counters.fail.count) == (1, 3)


async def test_a_stream_takes_no_more_at_once_than_allowed(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1)), max_in_flight=3) as w:
        w.gate.close()
        stream = w.stub.ModelStreamInfer(metadata=TOKEN)
        writing = asyncio.create_task(_write(stream, 12))
        await eventually(lambda: sum(w.gate.arrived) + _queued_rows(w) == 6)
        w.gate.open()
        answers = await read(stream, 12)
        await writing
        assert [outputs(a.infer_response)["score"] for a in answers] == [[1, 5]] * 12
        assert max(w.gate.arrived) <= 6


async def test_what_a_stream_holds_is_answered_before_the_worker_ends(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        w.gate.close()
        stream = w.stub.ModelStreamInfer(metadata=TOKEN)
        await _write(stream, 2)
        await eventually(lambda: sum(w.gate.arrived) + _queued_rows(w) == 4)
        draining = asyncio.create_task(w.server.drain())
        await asyncio.sleep(0)
        w.gate.open()
        assert [outputs(a.infer_response)["score"] for a in await read(stream, 2)] == [[1, 5]] * 2
        assert await stream.read() is grpc.aio.EOF
        await draining


async def test_with_tritons_header_a_failed_request_ends_the_stream_with_its_status(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        stream = w.stub.ModelStreamInfer(metadata=(*TOKEN, ("triton_grpc_error", "true")))
        await stream.write(ranking(ONE, ROWS))
        await stream.write(ranking(ONE, ROWS, model_name="none"))
        assert outputs((await stream.read()).infer_response)["score"] == [1, 5]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_stream_says_at_its_end_what_it_cost_altogether(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        stream = w.stub.ModelStreamInfer(metadata=TOKEN)
        for name in ("ranker", "none", "ranker"):
            await stream.write(ranking(ONE, ROWS, model_name=name))
        await stream.done_writing()
        answers = [message.infer_response for message in await read(stream, 3)]
        assert await stream.read() is grpc.aio.EOF
        trailers = dict(await stream.trailing_metadata())
        assert (trailers["plait-answered"], trailers["plait-failed"]) == ("2", "1")
        told_us = sum(answer.parameters["compute_us"].int64_param for answer in answers)
        assert told_us <= int(trailers["plait-compute-us"]) <= told_us + 2  # each answer's is rounded down
        assert "plait-batch-rows" not in trailers


async def test_a_stream_that_ends_in_an_error_says_so_too(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w:
        stream = w.stub.ModelStreamInfer(metadata=(*TOKEN, ("triton_grpc_error", "true")))
        await stream.write(ranking(ONE, ROWS, model_name="none"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert dict(refused.value.trailing_metadata())["plait-failed"] == "1"
        assert isinstance(from_rpc_error(refused.value), NotFound)


async def test_a_message_that_cannot_be_parsed_ends_the_stream_with_a_code(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w, open_channel(w.server.address, ChannelSettings()) as channel:
        stream = channel.stream_stream(METHOD)(metadata=TOKEN)
        await stream.write(ranking(ONE, ROWS).SerializeToString())
        await stream.write(b"\xff")
        assert pb.ModelStreamInferResponse.FromString(await stream.read()).infer_response.model_name == "ranker"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("_log_level")
async def test_log_settings_are_changed_by_call_only_where_that_is_allowed(v1: ModelVersion) -> None:
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 1
    async with worker_world(snapshot(model("ranker", v1))) as w:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await w.stub.LogSettings(request, metadata=TOKEN)
        assert isinstance(from_rpc_error(refused.value), PermissionDenied)
    async with worker_world(snapshot(model("ranker", v1)), protocol={"log_control": True}) as w:
        answer = await w.stub.LogSettings(request, metadata=TOKEN)
        assert answer.settings["log_verbose_level"].uint32_param == 1
        assert logging.getLogger().level == logging.DEBUG


async def test_reflection_lists_every_method(v1: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", v1))) as w, open_channel(w.server.address, ChannelSettings()) as channel:
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(asked)
        answer = await call.read()
        call.cancel()
        file = descriptor_pb2.FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        methods = [method.name for method in file.service[0].method]
        assert methods == [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
        assert "ModelStreamInfer" in methods


async def _write(stream: Any, count: int) -> None:
    for _ in range(count):
        await stream.write(ranking(ONE, ROWS))


def _queued_rows(w: WorkerWorld) -> int:
    return w.models.get("ranker").batcher._schedule.queued_rows
