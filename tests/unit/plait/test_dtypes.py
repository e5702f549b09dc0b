"""The table of element types agrees with numpy, the protos and itself."""

from __future__ import annotations

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype of numpy
import numpy as np

from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME, BY_NUMBER, BY_OIP


def test_numbers_are_the_protos() -> None:
    names = {number: name.removeprefix("DATA_TYPE_").lower() for name, number in types_pb2.DataType.items() if number}
    assert {number: d.name for number, d in BY_NUMBER.items()} == names


def test_sizes_are_numpys() -> None:
    for dtype in BY_NAME.values():
        if dtype.size_bytes:
            assert np.dtype(dtype.numpy).itemsize == dtype.size_bytes
            assert np.dtype(dtype.numpy).name == dtype.name
            assert np.dtype(dtype.numpy).byteorder in "|<="
    assert len(BY_OIP) == len(BY_NAME) == len(BY_NUMBER)
