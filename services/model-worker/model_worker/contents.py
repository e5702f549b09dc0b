"""One tensor's contents, raw or typed, as an array of the shape and type it says it has."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from model_worker import packed
from model_worker.packed import Array
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import DType

_LENGTH: Final = struct.Struct("<I")
TYPED_FIELD: Final = MappingProxyType(
    {
        "bool": "bool_contents",
        "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents",
        "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
        "float32": "fp32_contents", "float64": "fp64_contents",
        "bytes": "bytes_contents",
    }
)  # fmt: skip
FIELD_NUMBER: Final = MappingProxyType({f.name: f.number for f in pb.InferTensorContents.DESCRIPTOR.fields})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What contents should be. Its methods raise ValueError that says what is wrong with them."""

    shape: tuple[int, ...]
    dtype: DType

    def raw(self, content: bytes) -> Array:
        """Return row-major, little-endian bytes as an array; a view of them, except BYTES."""
        if self.dtype.name == "bytes":
            return self._raw_bytes(content)
        size = self._count * self.dtype.size_bytes
        if len(content) != size:
            raise ValueError(f"{list(self.shape)} {self.dtype.oip} takes {size} bytes, found {len(content)}")
        if self.dtype.name == "bool" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
            raise ValueError("an element of BOOL is one byte, 0 or 1")
        return np.ndarray(self.shape, np.dtype(self.dtype.numpy), content)

    def typed(self, contents: pb.InferTensorContents) -> Array:
        """Return the elements of the field that belongs to the type as an array."""
        name = TYPED_FIELD.get(self.dtype.name)
        if name is None:
            raise ValueError(f"{self.dtype.oip} has no typed contents in the protocol: send it in raw_input_contents")
        if name == "bytes_contents":
            self._check_alone(contents, name)
            self._check_count(len(contents.bytes_contents))
            return objects(list(contents.bytes_contents), self.shape)
        content = packed.only(contents.SerializeToString(), FIELD_NUMBER[name])
        if content is None:
            self._check_alone(contents, name)
            raise ValueError("holds a field that the protocol does not know")
        return self._unpacked(content)

    @property
    def _count(self) -> int:
        return math.prod(self.shape)

    def _check_count(self, found: int) -> None:
        if found != self._count:
            raise ValueError(f"{list(self.shape)} takes {self._count} elements, found {found}")

    def _check_alone(self, contents: pb.InferTensorContents, name: str) -> None:
        filled = [descriptor.name for descriptor, _ in contents.ListFields()]
        if filled != [name]:
            raise ValueError(f"{self.dtype.oip} belongs in {name}, found {', '.join(filled) or 'nothing'}")

    def _unpacked(self, content: memoryview) -> Array:
        kind: np.dtype[Any] = np.dtype(self.dtype.numpy)
        if kind.kind in "fb":
            self._check_count(len(content) // kind.itemsize)
            return np.frombuffer(content, kind).reshape(self.shape)
        wide: Array = packed.decode_varints(content)
        self._check_count(len(wide))
        if kind.kind == "i":
            wide = wide.view(np.int64)
        narrow = wide.astype(kind)
        if kind.itemsize < wide.itemsize and not np.array_equal(narrow, wide):
            raise ValueError(f"holds values that {self.dtype.oip} does not")
        return narrow.reshape(self.shape)

    def _raw_bytes(self, content: bytes) -> Array:
        """BYTES: per element a 4-byte little-endian length, then that many bytes."""
        count = self._count
        elements: list[bytes] = []
        if count * _LENGTH.size > len(content):
            raise ValueError(f"{count} elements take at least {count * _LENGTH.size} bytes, found {len(content)}")
        at = 0
        while at + _LENGTH.size <= len(content) and len(elements) <= count:
            (length,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            elements.append(content[at : at + length])
            at += length
        if at != len(content) or len(elements) != count:
            raise ValueError(f"expected exactly {count} elements, each a 4-byte length and its bytes")
        return objects(elements, self.shape)


def bytes_elements(array: Array) -> bytes:
    """Return an array of bytes objects in BYTES' raw form."""
    return b"".join(part for element in array.reshape(-1).tolist() for part in (_LENGTH.pack(len(element)), element))


def objects(elements: list[bytes], shape: tuple[int, ...]) -> Array:
    """Return an object array, not one of fixed-width bytes: numpy strips trailing zeros off those."""
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(shape)
