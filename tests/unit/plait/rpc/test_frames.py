"""Frames as bytes are what protobuf's own parser makes of them, and joining changes nothing but the number of messages."""

import contextlib
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.inference.v2 import inference_pb2
from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.rpc import frames
from plait.rpc.frames import Numbers

NUMBERS = Numbers.of(pb.StreamInferResponse)
NAMES = st.text(max_size=300)
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([frames._FRAME_BYTES - 1, frames._FRAME_BYTES, frames._FRAME_BYTES + 1, 200_000]))


def test_the_numbers_of_fields_are_those_of_the_contract() -> None:
    assert NUMBERS == (4, 5)
    assert Numbers.of(features_pb.StreamFeaturesResponse) == (0, 4)
    for request in (pb.StreamInferRequest, features_pb.StreamFeaturesRequest):
        assert request.DESCRIPTOR.fields_by_name["more"].number == frames.REQUEST_MORE
        assert [request.DESCRIPTOR.fields_by_name[name].number for name in ("call", "request")] == [1, 2]


@given(NAMES, st.binary(max_size=400), st.integers(0, 2**40))
def test_a_frame_of_bytes_is_the_frame_of_their_message(name: str, tensor: bytes, timeout_us: int) -> None:
    header = types_pb2.CallHeader(call_id=7, timeout_us=timeout_us, tenant="shop")
    request = inference_pb2.ModelInferRequest(model_name=name, raw_input_contents=[tensor])
    data = frames.request_frame(header, request.SerializeToString())
    assert pb.StreamInferRequest.FromString(data) == pb.StreamInferRequest(call=header, request=request)
    assert frames.header(data) == header.SerializeToString()


@given(
    st.integers(0, 2**64 - 1), st.booleans(), st.booleans(), st.booleans(), NAMES, st.sampled_from([b"", b"\xf8\x3f\x96\x01", b"\x32\x01x"])
)
def test_an_answer_is_cut_in_its_parts(call_id: int, response: bool, status: bool, load: bool, name: str, unknown: bytes) -> None:
    answer = pb.StreamInferResponse(call_id=call_id)
    if response:
        answer.response.model_name = name
    if status:
        answer.status.SetInParent()
    if load:
        answer.load.in_flight = 3
    parts = frames.parts(unknown + answer.SerializeToString() + unknown, NUMBERS)
    assert parts.call_id == call_id
    assert parts.response == (answer.response.SerializeToString() if answer.HasField("response") else None)
    assert parts.status == (b"" if status else None)
    assert parts.load == (answer.load.SerializeToString() if load else None)


@given(st.lists(SIZES, min_size=1, max_size=200))
def test_what_is_joined_comes_apart_as_it_was_within_the_bounds(sizes: list[int]) -> None:
    made = [pb.StreamInferResponse(call_id=n + 1, status=types_pb2.CallStatus(message="m" * size)) for n, size in enumerate(sizes)]
    waiting = deque(answer.SerializeToString() for answer in made)
    found = []
    while waiting:
        left = len(waiting)
        message = frames.join(waiting, NUMBERS.more)
        cut = frames.cut(message, NUMBERS.more)
        assert 1 <= len(cut) == left - len(waiting) <= frames.MOST
        if len(cut) > 1:
            assert sum(map(len, cut)) <= frames.MOST_BYTES
            assert [more.call_id for more in pb.StreamInferResponse.FromString(message).more] == [
                frames.parts(one, NUMBERS).call_id for one in cut
            ]
        found += cut
    assert [pb.StreamInferResponse.FromString(data) for data in found] == made


@given(st.binary(max_size=64))
def test_random_bytes_never_do_worse_than_a_value_error(data: bytes) -> None:
    for start in (b"", b"\x2a", b"\x08", b"\x12"):
        with contextlib.suppress(ValueError):
            for one in frames.cut(start + data, NUMBERS.more):
                frames.parts(one, NUMBERS)
        with contextlib.suppress(ValueError):
            frames.header(start + data)


@given(st.lists(st.binary(max_size=40), min_size=2, max_size=4), st.data())
def test_what_is_cut_off_is_no_message(payloads: list[bytes], data: st.DataObject) -> None:
    message = frames.join(deque(payloads), NUMBERS.more)
    whole = [0]
    for payload in payloads:
        whole.append(whole[-1] + 2 + len(payload))
    at = data.draw(st.sampled_from([n for n in range(len(message)) if n not in whole]))
    with pytest.raises(ValueError, match="cut off"):
        frames.cut(message[:at], NUMBERS.more)
