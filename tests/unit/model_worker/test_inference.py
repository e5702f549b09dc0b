"""One call between message and answer, with models and batcher of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model_worker.batcher import Answer
from model_worker.inference import Inference
from model_worker.statistics import Statistics
from model_worker.tensors import Codec
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import InvalidArgument, NotFound
from plait.registry.records import Signature, TensorSpec
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline

CODEC = Codec(
    Signature(inputs=(TensorSpec(name="x", dtype="float32", shape=(-1,)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1,)),))
)
SOME = Deadline(12.5)


class Doubling:
    """A model "m", version "3", and its batcher: remembers what it was given."""

    def __init__(self) -> None:
        self.submitted: list[Any] = []
        self.statistics = Statistics()

    def get(self, model: str, version: str) -> Any:
        if (model, version) not in {("m", ""), ("m", "3")}:
            raise NotFound("Request for unknown model")
        return SimpleNamespace(model="m", version="3", codec=CODEC, batcher=self)

    async def submit(self, inputs: Any, rows: int, deadline_s: float, priority: int = 0, *, watched: bool = False) -> Answer:
        self.submitted.append((rows, deadline_s))
        return Answer(outputs=(inputs[0] * 2,), queue_s=0.0015, compute_s=0.25, batch_rows=9)


def request(**more: Any) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", **more)
    message.inputs.add(name="x", datatype="FP32", shape=[2])
    message.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
    return message


async def answer(models: Doubling, message: pb.ModelInferRequest, deadline: Deadline = SOME) -> pb.ModelInferResponse:
    enter(Call(method="m", tenant="t", deadline=deadline))
    response = pb.ModelInferResponse()
    await Inference(models, models.statistics).infer(message, response)  # type: ignore[arg-type]
    return response


async def test_the_answer_says_who_answered_and_what_it_cost() -> None:
    models = Doubling()
    response = await answer(models, request(id="r-1"))
    assert models.submitted == [(2, 12.5)]
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "r-1")
    assert {name: p.int64_param for name, p in response.parameters.items()} == {"queue_us": 1500, "compute_us": 250_000, "batch_rows": 9}
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [2, 4]


async def test_what_is_wrong_never_reaches_the_batcher() -> None:
    models = Doubling()
    with pytest.raises(NotFound):
        await answer(models, request(model_version="9"))
    wrong = request()
    wrong.inputs[0].datatype = "FP64"
    with pytest.raises(InvalidArgument):
        await answer(models, wrong)
    assert models.submitted == []


async def test_a_requests_own_timeout_shortens_the_calls_deadline_and_never_lengthens_it() -> None:
    models = Doubling()
    for timeout_us in (1, 10**15):
        message = request()
        message.parameters["timeout"].int64_param = timeout_us
        await answer(models, message, Deadline.after(60))
    (_, short), (_, long) = models.submitted
    assert short < long < short + 61


async def test_what_was_answered_and_what_failed_is_counted() -> None:
    models = Doubling()
    await answer(models, request())
    with pytest.raises(InvalidArgument):
        await answer(models, pb.ModelInferRequest(model_name="m"))
    counters = models.statistics.of("m", "3")
    assert (counters.rows, counters.success.count, counters.fail.count) == (2, 1, 1)
    assert (counters.queue.ns, counters.compute_infer.ns) == (1_500_000, 250_000_000)
    assert counters.success.ns >= counters.compute_input.ns + counters.compute_output.ns > 0
