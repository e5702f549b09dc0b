"""A sample is found usable or not before a byte of it is read as an array, with every problem named; nothing hostile gets far."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition
from plait.registry import self_test
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec


def manifest(dtype: Any = "float32", shape: tuple[int, ...] = (-1, 2)) -> ArtifactManifest:
    given, answered = (TensorSpec(name=name, dtype=dtype, shape=shape) for name in "xy")
    return ArtifactManifest(name="m", format="onnx", entry="m.onnx", inputs=(given,), outputs=(answered,))


def npz(**arrays: Any) -> bytes:
    target = io.BytesIO()
    np.savez(target, **{name.replace("_", "."): array for name, array in arrays.items()})
    return target.getvalue()


def packed(*elements: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(len(e).to_bytes(4, "little") + e for e in elements), np.uint8)


def refusal(content: bytes, said: ArtifactManifest) -> str:
    with pytest.raises(FailedPrecondition, match=r"^the self test cannot be used: ") as refused:
        self_test.check(content, said)
    assert refused.value.reason == "SELF_TEST_UNUSABLE"
    return refused.value.message


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"bytes"}))
def test_every_type_numpy_can_write(name: str) -> None:
    array = np.ones((3, 2), ml_dtypes.bfloat16 if name == "bfloat16" else BY_NAME[name].numpy)
    self_test.check(npz(input_x=array, output_y=np.asfortranarray(array)), manifest(name))
    assert f"the signature says {name} [-1, 3]" in refusal(npz(input_x=array, output_y=array), manifest(name, (-1, 3)))


TEXTS = np.array([[b"a", b"bc"], [b"", b"def"]])
FLAT = packed(b"a", b"bc", b"\x00", b"ends in zeros\x00\x00")


@pytest.mark.parametrize(
    "arrays",
    [
        {"input_x": TEXTS, "output_y": np.array([["ä", "b"]])},
        {"input_x": FLAT, "shape_input_x": np.int64([2, 2]), "output_y": FLAT, "shape_output_y": np.int64([2, 2])},
    ],
)
def test_bytes_as_strings_or_packed(arrays: dict[str, Any]) -> None:
    self_test.check(npz(**arrays), manifest("bytes"))


def test_packed_bytes_without_a_shape_have_one_dimension() -> None:
    self_test.check(npz(input_x=FLAT, output_y=FLAT), manifest("bytes", (4,)))
    assert "input.x is bytes [4], the signature says bytes [-1, 2]" in refusal(npz(input_x=FLAT, output_y=FLAT), manifest("bytes"))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_x": FLAT[:-1]}, "end in the middle of one"),
        ({"input_x": FLAT, "shape_input_x": np.int64([3, 2])}, "holds 4 elements, shape.input.x says [3, 2]"),
        ({"input_x": FLAT, "shape_input_x": np.int64([-2, -2])}, "says [-2, -2]"),
        ({"input_x": FLAT, "shape_input_x": np.int32([2, 2])}, "shape.input.x is <i4 [2], a shape is int64"),
        ({"input_x": FLAT.reshape(1, -1)}, "packed bytes are uint8 [size]"),
        ({"input_x": np.ones((1, 2), np.int16)}, "input.x is <i2 [1, 2], the signature says bytes"),
        ({"input_x": np.array([["a", None]], np.object_)}, "holds Python objects, which only pickle reads"),
    ],
)
def test_bytes_that_are_not_right_are_named(arrays: dict[str, Any], says: str) -> None:
    message = refusal(npz(**arrays), manifest("bytes"))
    assert says in message
    assert "it lacks 'output.y'" in message  # and what else is wrong, too


@pytest.mark.parametrize(
    "array", [np.ones((1, 2)), np.ones((1, 2), ">f4"), np.ones((0, 2), "<f4"), np.ones(2, "<f4"), np.zeros((1, 2), "f4,f4"), np.float32(1)]
)
def test_other_types_and_shapes_are_refused(array: Any) -> None:
    refusal(npz(input_x=array, output_y=np.ones((1, 2), np.float32)), manifest())


def archive(**members: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(f"{name.replace('_', '.')}.npy", content)
    return target.getvalue()


def npy(header: str, content: bytes = b"", length: int | None = None, version: int = 1) -> bytes:
    length = len(header) if length is None else length
    return b"\x93NUMPY" + bytes((version, 0)) + length.to_bytes(2 if version == 1 else 4, "little") + header.encode() + content


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 2)}"


@pytest.mark.parametrize(
    "member",
    [
        npy(HUGE),
        npy(HUGE, version=2),
        npy("{'descr': '<f4', 'shape': (1, 2)}", bytes(7)),
        npy("{'descr': '<f4', 'shape': (1, 2)}", bytes(8), 60_000),
        npy("{'descr': '<f4', 'shape': (1, 2)}", bytes(8), 1 << 31, 2),
        npy("{'descr': '<f4', 'shape': (-1, 2)}", bytes(8)),
        npy("{'descr': '<f4', 'shape': (True, 2)}", bytes(8)),
        npy("{'descr': '<f4', 'shape': [1, 2]}", bytes(8)),
        npy("{'descr': [('a', '<f4')], 'shape': (1, 2)}", bytes(8)),
        npy("__import__('os').abort()"),
        npy("(" * 9000),
        npy("-" * 9000 + "1"),
        b"",
        b"\x93NUMPY",
        b"no array at all",
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_refused_before_any_memory_is_taken(member: bytes) -> None:
    refusal(archive(input_x=member, output_y=member), manifest())


def test_a_small_file_that_unpacks_to_gigabytes_is_refused() -> None:
    content = archive(input_x=bytes(self_test.MAX_BYTES + 1))
    assert len(content) < 1_000_000
    assert "publish fewer rows" in refusal(content, manifest())


GOOD = npz(input_x=np.ones((2, 2), np.float32), output_y=np.ones((2, 2), np.float32))


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@example(0, 0)
def test_a_changed_byte_is_refused_as_unusable_or_harmless(at: int, byte: int) -> None:
    content = bytearray(GOOD)
    content[at] = byte
    try:
        self_test.check(bytes(content), manifest())
    except FailedPrecondition as error:
        assert error.reason == "SELF_TEST_UNUSABLE"  # noqa: PT017 - most changes are found, some change nothing that is looked at


@given(st.lists(st.binary(max_size=20)))
def test_packed_elements_come_back(elements: list[bytes]) -> None:
    assert self_test.elements(packed(*elements).tobytes() if elements else b"") == elements


@given(st.binary(max_size=40))
def test_any_bytes_are_elements_or_refused(content: bytes) -> None:
    try:
        found = self_test.elements(content)
    except ValueError:
        return
    assert packed(*found).tobytes() == content if found else content == b""
