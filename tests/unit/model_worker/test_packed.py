"""Packed fields are read and written exactly as protobuf does it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker import packed
from plait.api.inference.v2 import inference_pb2 as pb

NUMBERS = {field.name: field.number for field in pb.InferTensorContents.DESCRIPTOR.fields}
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
FIELDS = {
    "int_contents": (INT32, np.int32),
    "int64_contents": (INT64, np.int64),
    "uint_contents": (UINT32, np.uint32),
    "uint64_contents": (UINT64, np.uint64),
}


@pytest.mark.parametrize("name", FIELDS)
@given(data=st.data())
def test_varints_are_read_as_protobuf_wrote_them(name: str, data: st.DataObject) -> None:
    values, dtype = FIELDS[name]
    wanted = data.draw(st.lists(values, min_size=1, max_size=200))
    message = pb.InferTensorContents(**{name: wanted})
    content = packed.only(message.SerializeToString(), NUMBERS[name])
    assert content is not None
    found = packed.decode_varints(content)
    signed = found.view(np.int64) if np.dtype(dtype).kind == "i" else found
    assert signed.tolist() == wanted


@pytest.mark.parametrize("name", FIELDS)
@given(data=st.data())
def test_protobuf_reads_the_varints_we_write(name: str, data: st.DataObject) -> None:
    values, dtype = FIELDS[name]
    wanted = data.draw(st.lists(values, min_size=1, max_size=200))
    message = pb.InferTensorContents.FromString(packed.field(NUMBERS[name], packed.encode_varints(np.array(wanted, dtype))))
    assert list(getattr(message, name)) == wanted


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
def test_a_packed_field_of_floats_is_the_array(wanted: list[float]) -> None:
    message = pb.InferTensorContents(fp32_contents=wanted)
    content = packed.only(message.SerializeToString(), NUMBERS["fp32_contents"])
    assert content is not None
    assert np.frombuffer(content, "<f4").tolist() == wanted
    assert packed.field(NUMBERS["fp32_contents"], bytes(content)) == message.SerializeToString()


def test_no_varints_are_no_values() -> None:
    assert packed.decode_varints(memoryview(b"")).tolist() == []


def test_nothing_is_read_of_a_message_with_another_field_or_none() -> None:
    both = pb.InferTensorContents(int_contents=[1], fp32_contents=[1.0]).SerializeToString()
    assert packed.only(both, NUMBERS["int_contents"]) is None
    assert packed.only(both, NUMBERS["fp32_contents"]) is None
    assert packed.only(b"", NUMBERS["int_contents"]) is None
