"""The one table of element types: what manifests, tensors on our wire and the Open Inference Protocol call the same thing.

Kept free of numpy so that the client library stays light: a numpy dtype is made from `DType.numpy` where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One element type. `name` is used in manifests, `oip` on the Open Inference wire, `number` in `plait.api.types.v1.DataType`.

    `numpy` is a little-endian numpy dtype string ("bfloat16" is one only where ml_dtypes was imported); `size_bytes` is 0 for variable-length elements.
    """

    name: str
    oip: str
    number: int
    numpy: str
    size_bytes: int


_TABLE: Final = (
    DType(name="bool", oip="BOOL", number=1, numpy="|b1", size_bytes=1),
    DType(name="int8", oip="INT8", number=2, numpy="|i1", size_bytes=1),
    DType(name="int16", oip="INT16", number=3, numpy="<i2", size_bytes=2),
    DType(name="int32", oip="INT32", number=4, numpy="<i4", size_bytes=4),
    DType(name="int64", oip="INT64", number=5, numpy="<i8", size_bytes=8),
    DType(name="uint8", oip="UINT8", number=6, numpy="|u1", size_bytes=1),
    DType(name="uint16", oip="UINT16", number=7, numpy="<u2", size_bytes=2),
    DType(name="uint32", oip="UINT32", number=8, numpy="<u4", size_bytes=4),
    DType(name="uint64", oip="UINT64", number=9, numpy="<u8", size_bytes=8),
    DType(name="float16", oip="FP16", number=10, numpy="<f2", size_bytes=2),
    DType(name="float32", oip="FP32", number=11, numpy="<f4", size_bytes=4),
    DType(name="float64", oip="FP64", number=12, numpy="<f8", size_bytes=8),
    DType(name="bytes", oip="BYTES", number=13, numpy="|O", size_bytes=0),
    DType(name="bfloat16", oip="BF16", number=14, numpy="bfloat16", size_bytes=2),
)

BY_NAME: Final = MappingProxyType({d.name: d for d in _TABLE})
BY_OIP: Final = MappingProxyType({d.oip: d for d in _TABLE})
BY_NUMBER: Final = MappingProxyType({d.number: d for d in _TABLE})
