"""One tensor's contents: what fits becomes an array of the shape, what does not says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.contents import Contents, bytes_elements, objects
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME


def contents(dtype: str, *shape: int) -> Contents:
    return Contents(shape=shape, dtype=BY_NAME[dtype])


@given(st.lists(st.binary(max_size=9), min_size=6, max_size=6))
def test_bytes_are_read_as_they_were_written(elements: list[bytes]) -> None:
    array = objects(elements, (2, 3))
    assert contents("bytes", 2, 3).raw(bytes_elements(array)).tolist() == array.tolist()


@pytest.mark.parametrize(
    ("dtype", "content", "words"),
    [
        ("float32", b"\0" * 7, "takes 8 bytes, found 7"),
        ("bfloat16", b"\0" * 8, "takes 4 bytes, found 8"),
        ("bool", b"\x01\xff", "0 or 1"),
        ("bytes", b"\0" * 7, "at least 8 bytes"),
        ("bytes", b"\0" * 9, "exactly 2 elements"),
        ("bytes", b"\xff\xff\xff\xff\0\0\0\0", "exactly 2 elements"),
    ],
)
def test_raw_contents_of_the_wrong_size_say_so(dtype: str, content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        contents(dtype, 2).raw(content)


@pytest.mark.parametrize(
    ("dtype", "fields", "words"),
    [
        ("float16", {"fp32_contents": [1, 2]}, "no typed contents"),
        ("int16", {"int_contents": [1, 70_000]}, "holds values that INT16 does not"),
        ("uint8", {"uint_contents": [1, 256]}, "holds values that UINT8 does not"),
        ("int64", {"int64_contents": [1, 2, 3]}, "takes 2 elements, found 3"),
        ("float64", {"fp64_contents": [1]}, "takes 2 elements, found 1"),
        ("bytes", {"bytes_contents": [b""]}, "takes 2 elements, found 1"),
        ("bytes", {}, "belongs in bytes_contents, found nothing"),
        ("float32", {"fp32_contents": [1, 2], "int_contents": [1]}, "belongs in fp32_contents, found int_contents, fp32_contents"),
    ],
)
def test_typed_contents_that_do_not_fit_say_why(dtype: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        contents(dtype, 2).typed(pb.InferTensorContents(**fields))


def test_a_field_the_protocol_does_not_know_is_not_taken_for_values() -> None:
    message = pb.InferTensorContents.FromString(pb.InferTensorContents(fp32_contents=[1, 2]).SerializeToString() + b"\x7a\x01a")
    with pytest.raises(ValueError, match="does not know"):
        contents("float32", 2).typed(message)


def test_raw_numbers_are_a_view() -> None:
    array = contents("int32", 2, 1).raw(b"\x01\0\0\0\x02\0\0\0")
    assert (array.tolist(), array.dtype, array.flags.owndata, array.flags.writeable) == ([[1], [2]], np.int32, False, False)
