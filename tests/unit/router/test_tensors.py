"""Tensors on their way through: bytes as they came, and every answer that is not what the signature says is told as such."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import DI, DU, snapshot

from plait.api.inference.v2 import inference_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_OIP
from plait.errors import FailedPrecondition, Unavailable
from plait.registry.places import Place
from router.route_table import compile_table
from router.tensors import column_of, copy_outputs, fill_infer, parameter, scores_of

ARM = compile_table(snapshot()).find("home", "shop").weighted[0]
LAYOUTS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


def answer(raw: bytes, shape: tuple[int, ...], datatype: str = "FP32", name: str = "score") -> inference_pb2.ModelInferResponse:
    response = inference_pb2.ModelInferResponse(raw_output_contents=[raw])
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    return response


def test_inputs_go_in_signature_order_with_their_bytes_untouched() -> None:
    user = types_pb2.Tensor(name="user", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1, DU], data=b"12345678")
    item = types_pb2.Tensor(name="item", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[2, DI], data=b"x" * 24)
    request = inference_pb2.ModelInferRequest()
    fill_infer(request, ARM, {"item": item, "user": user, "more": item}, ["score"], "r-1")
    assert (request.model_name, request.model_version, request.id) == ("ranker", "2", "r-1")
    assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [("user", "FP32", [1, DU]), ("item", "FP32", [2, DI])]
    assert list(request.raw_input_contents) == [b"12345678", b"x" * 24]
    assert [o.name for o in request.outputs] == ["score"]


def test_an_input_that_was_not_answered_is_worth_a_retry() -> None:
    with pytest.raises(Unavailable, match="'user'") as caught:
        fill_infer(inference_pb2.ModelInferRequest(), ARM, {}, (), "")
    assert caught.value.reason == "FEATURES_UNAVAILABLE"
    assert caught.value.retry_after_s is not None


@given(scores=st.lists(st.floats(), min_size=1, max_size=20), datatype=st.sampled_from(sorted(LAYOUTS)), column=st.booleans())
def test_scores_of_any_float_become_float32(scores: list[float], datatype: str, column: bool) -> None:
    with np.errstate(over="ignore"):
        sent = np.array(scores).astype(LAYOUTS[datatype])
        expected = sent.astype(np.float32)
    found = scores_of(answer(sent.tobytes(), (len(scores), 1) if column else (len(scores),), datatype), "score", len(scores))
    assert found.dtype == np.float32
    assert found.shape == (len(scores),)
    assert np.array_equal(found, expected, equal_nan=True)


def test_the_score_is_found_by_name() -> None:
    response = answer(b"\0" * 8, (2,), name="other")
    response.outputs.add(name="score", datatype="FP32", shape=[2])
    response.raw_output_contents.append(np.array([1, 2], "<f4").tobytes())
    assert scores_of(response, "score", 2).tolist() == [1.0, 2.0]


SCORES = np.zeros(3, "<f4").tobytes()
NOT_RAW = inference_pb2.ModelInferResponse()
NOT_RAW.outputs.add(name="score", datatype="FP32", shape=[3]).contents.fp32_contents.extend([0, 0, 0])


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (inference_pb2.ModelInferResponse(), "no output 'score'"),
        (answer(SCORES, (3,), name="scores"), "no output 'score'"),
        (NOT_RAW, "no output 'score'"),
        (answer(SCORES, (2,)), "FP32 [2] in 12 bytes"),
        (answer(SCORES, (3, 2)), "FP32 [3, 2]"),
        (answer(SCORES, (1, 3)), "FP32 [1, 3]"),
        (answer(SCORES, ()), "FP32 []"),
        (answer(SCORES, (-3,)), "FP32 [-3]"),
        (answer(SCORES[:-1], (3,)), "in 11 bytes"),
        (answer(SCORES, (3,), "INT32"), "INT32 [3]"),
        (answer(SCORES, (3,), "FP64"), "FP64 [3] in 12 bytes"),
        (answer(SCORES, (3,), ""), " [3]"),
    ],
)
def test_scores_that_are_not_one_float_per_row_are_a_mismatch(response: inference_pb2.ModelInferResponse, said: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        scores_of(response, "score", 3)
    assert caught.value.reason == "SIGNATURE_MISMATCH"
    assert said in caught.value.message


@given(data=st.data(), oip=st.sampled_from([oip for oip, dtype in BY_OIP.items() if dtype.size_bytes]))
def test_outputs_of_every_dtype_pass_through(data: st.DataObject, oip: str) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    size = math.prod(shape) * BY_OIP[oip].size_bytes
    raw = data.draw(st.binary(min_size=size, max_size=size))
    response = pb.PredictResponse()
    copy_outputs(answer(raw, shape, oip, "embedding"), response.outputs)
    [output] = response.outputs
    assert (output.name, output.dtype, tuple(output.shape), output.data) == ("embedding", BY_OIP[oip].number, shape, raw)


def test_bytes_outputs_pass_through_whatever_their_length() -> None:
    response = pb.PredictResponse()
    copy_outputs(answer(b"\3\0\0\0abc", (1,), "BYTES"), response.outputs)
    assert response.outputs[0].data == b"\3\0\0\0abc"


@pytest.mark.parametrize(
    "response",
    [NOT_RAW, answer(SCORES, (2,)), answer(SCORES, (3,), "COMPLEX64"), inference_pb2.ModelInferResponse(raw_output_contents=[b""])],
)
def test_outputs_that_do_not_hold_together_are_a_mismatch(response: inference_pb2.ModelInferResponse) -> None:
    into: Any = pb.PredictResponse().outputs
    with pytest.raises(FailedPrecondition) as caught:
        copy_outputs(response, into)
    assert caught.value.reason == "SIGNATURE_MISMATCH"


def test_a_parameter_that_is_not_there_is_zero() -> None:
    response = inference_pb2.ModelInferResponse()
    response.parameters["queue_us"].int64_param = 7
    assert (parameter(response, "queue_us"), parameter(response, "compute_us")) == (7, 0)
    assert "compute_us" not in response.parameters


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_a_column_is_its_numbers_and_what_is_none_is_the_lowest(values: list[float]) -> None:
    rows = np.array([[7, value] for value in values], "<f4")
    column = column_of(types_pb2.Tensor(name="item", data=rows.tobytes()), Place("item", 1, "float32"), len(values))
    known = [value for value in values if math.isfinite(value)]
    assert column.tolist() == [value if math.isfinite(value) else min(known, default=0.0) for value in values]


def test_a_column_of_integers_is_read_in_their_type() -> None:
    tensor = types_pb2.Tensor(name="item", data=np.array([[1, 2], [3, -4]], "<i8").tobytes())
    assert column_of(tensor, Place("item", 1, "int64"), 2).tolist() == [2.0, -4.0]
