"""Open Inference tensors: what is right comes through bit by bit, what is wrong is named, all of it at once."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from model_worker.tensors import Codec
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME
from plait.errors import InvalidArgument
from plait.registry.records import Signature, TensorSpec

NUMERIC = [name for name in BY_NAME if name != "bytes"]
TYPED = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents",
    "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
    "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip
RANKER = Signature(
    inputs=(
        TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, 3)),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)), TensorSpec(name="group", dtype="int64", shape=(-1,))),
)
USER = np.array([[1, 2]], np.float32)
ITEM = np.arange(12, dtype=np.float32).reshape(4, 3)


def one(dtype: str, shape: tuple[int, ...] = (-1,)) -> Codec:
    """Return the codec of a model that gives back what it takes."""
    return Codec(
        Signature(
            inputs=(TensorSpec(name="x", dtype=dtype, shape=shape),),  # type: ignore[arg-type]
            outputs=(TensorSpec(name="y", dtype=dtype, shape=shape),),  # type: ignore[arg-type]
        )
    )


def raw(**arrays: np.ndarray[Any, Any]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=_oip(array), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def _oip(array: np.ndarray[Any, Any]) -> str:
    return next(d.oip for d in BY_NAME.values() if d.name == array.dtype.name)


def refused(codec: Codec, request: pb.ModelInferRequest) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        codec.decode(request)
    assert caught.value.reason == "TENSOR_INVALID"
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize("dtype", NUMERIC)
def test_raw_tensors_of_every_type_come_and_go_unchanged(dtype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 100]]).astype(BY_NAME[dtype].numpy)
    codec = one(dtype, (-1, 3))
    query = codec.decode(raw(x=array))
    assert query.rows == 2
    assert query.inputs[0].dtype == np.dtype(BY_NAME[dtype].numpy)
    np.testing.assert_array_equal(query.inputs[0], array)
    response = pb.ModelInferResponse()
    codec.encode(query, query.inputs, response)
    assert list(response.raw_output_contents) == [array.tobytes()]
    assert (response.outputs[0].name, response.outputs[0].datatype, list(response.outputs[0].shape)) == ("y", BY_NAME[dtype].oip, [2, 3])


@pytest.mark.parametrize("dtype", TYPED)
def test_typed_tensors_of_every_type_come_and_go_unchanged(dtype: str) -> None:
    kind = np.dtype(BY_NAME[dtype].numpy)
    low, high = (0, 1) if kind.kind in "bf" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = np.array([low, high, 1, 0], kind).tolist()
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype=BY_NAME[dtype].oip, shape=[4])
    getattr(tensor.contents, TYPED[dtype]).extend(values)
    codec = one(dtype)
    query = codec.decode(request)
    assert query.inputs[0].dtype == kind
    assert query.inputs[0].tolist() == values
    response = pb.ModelInferResponse()
    codec.encode(query, query.inputs, response)
    assert list(getattr(response.outputs[0].contents, TYPED[dtype])) == values
    assert not response.raw_output_contents


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=20))
def test_bytes_tensors_keep_every_byte(elements: list[bytes]) -> None:
    codec = one("bytes")
    request = pb.ModelInferRequest(raw_input_contents=[b"".join(struct.pack("<I", len(e)) + e for e in elements)])
    request.inputs.add(name="x", datatype="BYTES", shape=[len(elements)])
    query = codec.decode(request)
    assert query.inputs[0].tolist() == elements
    response = pb.ModelInferResponse()
    codec.encode(query, query.inputs, response)
    assert list(response.raw_output_contents) == list(request.raw_input_contents)
    typed = pb.ModelInferRequest()
    typed.inputs.add(name="x", datatype="BYTES", shape=[len(elements)]).contents.bytes_contents.extend(elements)
    query, response = codec.decode(typed), pb.ModelInferResponse()
    codec.encode(query, query.inputs, response)
    assert list(response.outputs[0].contents.bytes_contents) == elements


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x05\x00\x00\x00ab", b"\x00\x00\x00\x00" * 2, b"\xff\xff\xff\xff", b"\x00" * 5])
def test_bytes_tensors_that_do_not_add_up_are_refused(content: bytes) -> None:
    request = pb.ModelInferRequest(raw_input_contents=[content])
    request.inputs.add(name="x", datatype="BYTES", shape=[1])
    assert "raw_input_contents[0]" in refused(one("bytes"), request)


def test_a_raw_input_is_a_view_and_keeps_the_order_of_the_signature() -> None:
    query = Codec(RANKER).decode(raw(item=ITEM, user=USER))
    np.testing.assert_array_equal(query.inputs[0], USER)
    np.testing.assert_array_equal(query.inputs[1], ITEM)
    assert query.rows == 4
    assert not query.inputs[1].flags.owndata
    assert not query.inputs[1].flags.writeable


def test_only_the_outputs_asked_for_come_in_the_order_asked() -> None:
    codec, request = Codec(RANKER), raw(user=USER, item=ITEM)
    request.outputs.add(name="group")
    query, response = codec.decode(request), pb.ModelInferResponse()
    codec.encode(query, (np.zeros(4, np.float32), np.arange(4)), response)
    assert [output.name for output in response.outputs] == ["group"]
    assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == [0, 1, 2, 3]


def test_every_problem_is_named_at_once() -> None:
    request = raw(user=USER.astype(np.float64), item=ITEM.reshape(3, 4), other=USER)
    request.outputs.add(name="nothing")
    found = refused(Codec(RANKER), request)
    assert set(found) == {"inputs[0].datatype", "inputs[1].shape", "inputs[2].name", "outputs[0].name"}
    assert "FP32" in found["inputs[0].datatype"]
    assert "score, group" in found["outputs[0].name"]


def test_missing_and_doubled_names_are_refused() -> None:
    request = raw(item=ITEM)
    request.inputs.add(name="item", datatype="FP32", shape=[4, 3])
    request.raw_input_contents.append(ITEM.tobytes())
    request.outputs.add(name="score")
    request.outputs.add(name="score")
    found = refused(Codec(RANKER), request)
    assert "twice" in found["inputs[1].name"]
    assert "'user' (FP32 [1, 2]) is missing" in found["inputs"]
    assert "twice" in found["outputs[1].name"]


@pytest.mark.parametrize("shape", [[], [4], [4, 2], [0, 3], [-1, 3], [4, 3, 1], [1 << 62, 3]])
def test_shapes_that_do_not_fit_are_refused(shape: list[int]) -> None:
    request = raw(user=USER, item=ITEM)
    request.inputs[1].shape[:] = shape
    found = refused(Codec(RANKER), request)
    assert set(found) <= {"inputs[1].shape", "raw_input_contents[1]"}


@pytest.mark.parametrize("shape", [[-1, -1], [-1, 1], [-2, -2]])
@pytest.mark.parametrize("dtype", ["float32", "bytes"])
def test_a_variable_dimension_has_a_size_in_a_request(shape: list[int], dtype: str) -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"\0" * 4])  # as much as -1 × -1 elements take
    request.inputs.add(name="x", datatype=BY_NAME[dtype].oip, shape=shape)
    assert "is 1 or more" in refused(one(dtype, (-1, -1)), request)["inputs[0].shape"]


def test_the_byte_size_must_be_the_shapes() -> None:
    request = raw(user=USER, item=ITEM)
    request.raw_input_contents[1] = request.raw_input_contents[1][:-1]
    assert refused(Codec(RANKER), request) == {"raw_input_contents[1]": "[4, 3] FP32 takes 48 bytes, found 47"}


def test_raw_and_typed_contents_are_never_mixed() -> None:
    request = raw(user=USER, item=ITEM)
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    assert "never mixed" in refused(Codec(RANKER), request)["inputs[0].contents"]
    del request.raw_input_contents[1]
    assert "one entry per input (2), found 1" in refused(Codec(RANKER), request)["raw_input_contents"]


def test_typed_contents_must_be_in_the_right_field_and_number() -> None:
    request = pb.ModelInferRequest()
    contents = request.inputs.add(name="x", datatype="INT32", shape=[2]).contents
    assert "found nothing" in refused(one("int32"), request)["inputs[0].contents"]
    contents.int64_contents.extend([1, 2])
    assert "belongs in int_contents" in refused(one("int32"), request)["inputs[0].contents"]
    contents.Clear()
    contents.int_contents.extend([1, 2, 3])
    assert "takes 2 elements, found 3" in refused(one("int32"), request)["inputs[0].contents"]


def test_typed_values_that_do_not_fit_the_type_are_refused() -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="INT8", shape=[1]).contents.int_contents.append(128)
    assert "INT8" in refused(one("int8"), request)["inputs[0].contents"]


def test_fp16_has_no_typed_contents() -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP16", shape=[1]).contents.fp32_contents.append(1)
    assert "raw_input_contents" in refused(one("float16"), request)["inputs[0].contents"]


def test_inputs_of_one_request_must_agree_on_its_rows() -> None:
    both = Signature(
        inputs=(TensorSpec(name="a", dtype="int32", shape=(-1,)), TensorSpec(name="b", dtype="int32", shape=(-1,))), outputs=RANKER.outputs
    )
    found = refused(Codec(both), raw(a=np.zeros(2, np.int32), b=np.zeros(3, np.int32)))
    assert "a has 2, b has 3" in found["inputs"]


@given(st.binary(max_size=200))
def test_whatever_arrives_is_answered_or_refused(noise: bytes) -> None:
    request = raw(user=USER, item=ITEM)
    try:
        request.MergeFromString(noise)
    except DecodeError:
        return
    with contextlib.suppress(InvalidArgument):
        Codec(RANKER).decode(request)


def test_many_problems_are_counted_and_the_first_ones_named() -> None:
    request = pb.ModelInferRequest()
    for _ in range(100):
        request.inputs.add(name="n" * 100)
    with pytest.raises(InvalidArgument) as caught:
        Codec(RANKER).decode(request)
    assert len(caught.value.violations) == 16
    assert "(and 101 more)" in caught.value.message


def test_what_is_named_fits_a_header_however_long_the_names_are() -> None:
    inputs = tuple(TensorSpec(name=f"{i:03}{'n' * 97}", dtype="float32", shape=(-1,)) for i in range(100))
    request = pb.ModelInferRequest()
    for _ in range(100):
        request.inputs.add(name="x")
    with pytest.raises(InvalidArgument) as caught:
        Codec(Signature(inputs=inputs, outputs=RANKER.outputs)).decode(request)
    assert len(caught.value.violations) > 1
    assert len(caught.value.to_status().SerializeToString()) * 4 / 3 < 6000


def test_a_boolean_is_one_byte_of_0_or_1() -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"\x00\x01\x02"])
    request.inputs.add(name="x", datatype="BOOL", shape=[3])
    assert "0 or 1" in refused(one("bool"), request)["raw_input_contents[0]"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_typed_request_for_half_floats_is_answered_raw_as_a_whole(dtype: str) -> None:
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="int32", shape=(-1,)),),
        outputs=(TensorSpec(name="a", dtype=dtype, shape=(-1,)), TensorSpec(name="b", dtype="int32", shape=(-1,))),  # type: ignore[arg-type]
    )
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="INT32", shape=[2]).contents.int_contents.extend([1, 2])
    codec, response = Codec(signature), pb.ModelInferResponse()
    half = np.array([1, 2]).astype(BY_NAME[dtype].numpy)
    codec.encode(codec.decode(request), (half, np.array([3, 4], np.int32)), response)
    assert list(response.raw_output_contents) == [half.tobytes(), np.array([3, 4], np.int32).tobytes()]
    assert not any(tensor.HasField("contents") for tensor in response.outputs)


@pytest.mark.parametrize("typed", [False, True])
def test_classes_are_named_instead_of_values_where_asked(typed: bool) -> None:
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1,)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 3)),)
    )
    codec = Codec(signature, {"y": ("cat", "dog", "cow")})
    request = raw(x=np.array([1, 2], np.float32))
    if typed:
        request.ClearField("raw_input_contents")
        request.inputs[0].contents.fp32_contents.extend([1, 2])
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    query, response = codec.decode(request), pb.ModelInferResponse()
    assert query.classes == (2,)
    codec.encode(query, (np.array([[0, 1, 2], [5, 4, 3]], np.float32),), response)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 2])
    expected = [b"2.000000:2:cow", b"1.000000:1:dog", b"5.000000:0:cat", b"4.000000:1:dog"]
    if typed:
        assert list(response.outputs[0].contents.bytes_contents) == expected
    else:
        assert response.raw_output_contents[0] == b"".join(struct.pack("<I", len(e)) + e for e in expected)


def test_what_has_no_scores_cannot_be_classified() -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"\x01"])
    request.inputs.add(name="x", datatype="BOOL", shape=[1])
    request.outputs.add(name="y").parameters["classification"].int64_param = 1
    assert "cannot be classified" in refused(one("bool"), request)["outputs[0]"]


def test_parameters_are_handed_on_and_wrong_ones_refused_with_the_rest() -> None:
    request = raw(user=USER, item=ITEM)
    request.parameters["priority"].uint64_param = 2
    request.parameters["timeout"].int64_param = 250_000
    query = Codec(RANKER).decode(request)
    assert (query.priority, query.timeout_s) == (2, 0.25)
    request.parameters["timeout"].string_param = "soon"
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert set(refused(Codec(RANKER), request)) == {"parameters[timeout]", "inputs[0].parameters[shared_memory_region]"}


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from(["FP32", "FP64", ""]),
    st.integers(-1, 1),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(["score", "group", "nothing"]), max_size=3),
    st.booleans(),
)
def test_the_short_way_and_the_careful_one_agree(
    width: int, rows: int, datatype: str, spare: int, swapped: bool, mixed: bool, asked: list[str], classify: bool
) -> None:
    request = raw(user=USER, item=np.ones((rows, width), np.float32))
    request.inputs[1].datatype = datatype
    request.raw_input_contents[1] = (request.raw_input_contents[1] + b"\0")[: rows * width * 4 + spare]
    if swapped:
        request.inputs.reverse()  # type: ignore[attr-defined]
    if mixed:
        request.inputs[0].contents.fp32_contents.append(1)
    for name in asked:
        request.outputs.add(name=name)
    if asked and classify:
        request.outputs[0].parameters["classification"].int64_param = 1
    codec = Codec(RANKER)
    for _ in range(2):  # the second time with what was remembered of the first
        usual = codec._decode_usual(request)
        try:
            careful = codec._decode_with_care(request)
        except InvalidArgument:
            assert usual is None
            continue
        if usual is not None:
            assert (usual.rows, usual.outputs, usual.typed, usual.classes) == (
                careful.rows,
                careful.outputs,
                careful.typed,
                careful.classes,
            )
            for mine, other in zip(usual.inputs, careful.inputs, strict=True):
                np.testing.assert_array_equal(mine, other)


def test_the_usual_request_takes_the_short_way() -> None:
    request = raw(user=USER, item=ITEM)
    assert Codec(RANKER)._decode_usual(request) is not None
    request.outputs.add(name="score")  # as the router asks
    assert Codec(RANKER)._decode_usual(request) is not None


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_a_message_of_very_many_tensors_is_refused_before_they_are_read(field: str) -> None:
    request = raw(user=USER, item=ITEM)
    getattr(request, field).extend([getattr(request, field).add()] * 100_000)
    [(path, description)] = [(p, d) for p, d in refused(Codec(RANKER), request).items() if p != "raw_input_contents"]
    assert (path, description) == (field, f"{len(getattr(request, field))} are given; the model has 2")


def test_a_shape_of_very_many_dimensions_is_not_repeated_whole() -> None:
    request = raw(user=USER, item=ITEM)
    request.inputs[1].shape[:] = [7] * 1_000_000
    assert refused(Codec(RANKER), request)["inputs[1].shape"].endswith(f"found {[7] * 16}")


def test_a_fixed_dimension_may_be_nothing() -> None:
    query = one("float32", (-1, 0)).decode(raw(x=np.zeros((2, 0), np.float32)))
    assert (query.rows, query.inputs[0].shape) == (2, (2, 0))


def test_of_no_bytes_a_shape_may_still_be_too_large() -> None:
    codec, request = one("float32", (-1, 0)), pb.ModelInferRequest(raw_input_contents=[b""])
    request.inputs.add(name="x", datatype="FP32", shape=[2**62, 0])
    assert "too big" in refused(codec, request)["raw_input_contents[0]"]
