"""The scanner of the wire format sees what protobuf's own parser sees, and never a name that is not there."""

import contextlib
import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from plait.api.inference.v2 import inference_pb2
from plait.errors import InvalidArgument
from router import wire

NAMES = st.text(max_size=300)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Serialized requests: fields in any order, some given twice, unknown ones of every wire type between them."""
    pieces = [
        inference_pb2.ModelInferRequest(**{field: draw(NAMES)}).SerializeToString() for field in ("model_name", "model_version", "id") * 2
    ]
    pieces.append(inference_pb2.ModelInferRequest(raw_input_contents=[draw(st.binary(max_size=200))]).SerializeToString())
    pieces += [
        b"\xf8\x3f\x96\x01",
        b"\xf9\x3f12345678",
        b"\xfa\x3f\x02hi",
        b"\xfb\x3f\x08\x01\x0a\x01x\xfc\x3f",
        b"\xfd\x3f1234",
        b"\x08\x05",
    ]
    return b"".join(draw(st.permutations(pieces))[: draw(st.integers(0, len(pieces)))])


def parsed(data: bytes) -> wire.Head:
    message = inference_pb2.ModelInferRequest.FromString(data)
    return wire.Head(message.model_name, message.model_version, message.id)


@given(requests())
def test_a_head_is_what_the_parser_reads(data: bytes) -> None:
    assert wire.head(data) == parsed(data)


@given(requests(), st.randoms())
def test_a_truncated_message_is_an_error_or_a_shorter_message(data: bytes, chance: random.Random) -> None:
    short = data[: chance.randint(0, len(data))]
    try:
        expected = parsed(short)
    except DecodeError:
        with pytest.raises(InvalidArgument) as caught:
            wire.head(short)
        assert caught.value.reason == "MALFORMED_MESSAGE"
    else:
        assert wire.head(short) == expected


@given(st.binary(max_size=64))
def test_random_bytes_never_do_worse_than_malformed(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        wire.head(data)


@given(requests(), NAMES, NAMES)
def test_a_renamed_request_differs_by_its_name_alone(data: bytes, model: str, version: str) -> None:
    expected = inference_pb2.ModelInferRequest.FromString(data)
    expected.model_name, expected.model_version = model, version
    assert inference_pb2.ModelInferRequest.FromString(data + wire.renaming(model, version)) == expected


@given(st.dictionaries(NAMES, st.integers(0, 2**40), max_size=4), NAMES, st.lists(st.binary(max_size=300), max_size=3))
def test_an_answer_without_tensors_keeps_its_parameters(parameters: dict[str, int], name: str, tensors: list[bytes]) -> None:
    answer = inference_pb2.ModelInferResponse(model_name=name, raw_output_contents=tensors)
    for key, value in parameters.items():
        answer.parameters[key].int64_param = value
    for _ in tensors:
        answer.outputs.add(name=name, shape=[1])
    found = wire.without_tensors(answer.SerializeToString())
    assert found is not None
    assert not found.outputs
    assert not found.raw_output_contents
    assert (found.model_name, {key: one.int64_param for key, one in found.parameters.items()}) == (name, parameters)


@given(st.binary(max_size=64))
def test_of_random_bytes_nothing_is_learnt(data: bytes) -> None:
    wire.without_tensors(data)
