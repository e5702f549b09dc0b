"""Open Inference tensors ↔ numpy, checked against a model's signature before anything runs.

Raw contents become views of the message's bytes; typed contents are read packed (see `packed`). Every problem of a request is
reported at once, with its path. https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from model_worker import packed
from model_worker.packed import Array
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME, DType
from plait.errors import InvalidArgument, Violation
from plait.registry.records import Signature, TensorSpec

_LENGTH: Final = struct.Struct("<I")
_TYPED_FIELD: Final = MappingProxyType(
    {
        "bool": "bool_contents",
        "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents",
        "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
        "float32": "fp32_contents", "float64": "fp64_contents",
        "bytes": "bytes_contents",
    }
)  # fmt: skip
_FIELD_NUMBER: Final = MappingProxyType({f.name: f.number for f in pb.InferTensorContents.DESCRIPTOR.fields})


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A request that was found right: input arrays in the signature's order, its rows, and what to answer in which form."""

    inputs: tuple[Array, ...]
    rows: int
    outputs: tuple[int, ...]
    typed: bool


class Codec:
    """Reads requests and writes responses of one model; knows its signature, holds no state of a call."""

    def __init__(self, signature: Signature) -> None:
        self._inputs = signature.inputs
        self._outputs = signature.outputs
        self._position = {spec.name: i for i, spec in enumerate(signature.inputs)}
        self._output_position = {spec.name: i for i, spec in enumerate(signature.outputs)}
        self._dtypes = tuple(BY_NAME[spec.dtype] for spec in signature.inputs)
        self._output_dtypes = tuple(BY_NAME[spec.dtype] for spec in signature.outputs)

    def decode(self, request: pb.ModelInferRequest) -> Query:
        """Return the request's tensors. Raises InvalidArgument (TENSOR_INVALID) with every violation found."""
        reader = _Reader(request)
        arrays: list[Array | None] = [None] * len(self._inputs)
        for i, tensor in enumerate(request.inputs):
            position = self._position.get(tensor.name)
            if position is None:
                reader.wrong(f"inputs[{i}].name", f"the model has no such input; it takes {self._names(self._inputs)}")
            elif arrays[position] is not None:
                reader.wrong(f"inputs[{i}].name", f"{tensor.name!r} is given twice")
            else:
                arrays[position] = reader.read(i, tensor, self._inputs[position], self._dtypes[position])
        self._check_complete(request, reader)
        outputs = self._requested(request, reader)
        rows = self._rows(arrays, reader) if not reader.violations else 0
        if reader.violations:
            raise InvalidArgument(
                f"the request does not fit the model's signature: {reader.violations[0].field}: {reader.violations[0].description}",
                reason="TENSOR_INVALID",
                violations=reader.violations,
            )
        return Query(inputs=tuple(a for a in arrays if a is not None), rows=rows, outputs=outputs, typed=reader.typed)

    def encode(self, query: Query, outputs: Sequence[Array], response: pb.ModelInferResponse) -> None:
        """Write the wanted outputs into `response`: raw, unless the request itself was typed. FP16 is always raw in the protocol, so a
        typed request for it is answered raw as a whole."""
        typed = query.typed and all(self._outputs[i].dtype in _TYPED_FIELD for i in query.outputs)
        for i in query.outputs:
            array, dtype = outputs[i], self._output_dtypes[i]
            tensor = response.outputs.add(name=self._outputs[i].name, datatype=dtype.oip, shape=array.shape)
            if typed:
                _write_typed(tensor.contents, array, dtype)
            else:
                response.raw_output_contents.append(_write_bytes(array) if dtype.name == "bytes" else array.tobytes())

    def _check_complete(self, request: pb.ModelInferRequest, reader: _Reader) -> None:
        given = {tensor.name for tensor in request.inputs}
        for spec in self._inputs:
            if spec.name not in given:
                reader.wrong("inputs", f"{spec.name!r} ({BY_NAME[spec.dtype].oip} {list(spec.shape)}) is missing")

    def _requested(self, request: pb.ModelInferRequest, reader: _Reader) -> tuple[int, ...]:
        if not request.outputs:
            return tuple(range(len(self._outputs)))
        wanted: list[int] = []
        for i, output in enumerate(request.outputs):
            position = self._output_position.get(output.name)
            if position is None:
                reader.wrong(f"outputs[{i}].name", f"the model has no such output; it gives {self._names(self._outputs)}")
            elif position in wanted:
                reader.wrong(f"outputs[{i}].name", f"{output.name!r} is asked for twice")
            else:
                wanted.append(position)
        return tuple(wanted)

    def _rows(self, arrays: Sequence[Array | None], reader: _Reader) -> int:
        counts = {
            spec.name: len(array)
            for spec, array in zip(self._inputs, arrays, strict=True)
            if array is not None and spec.per == "row" and array.ndim
        }
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} has {n}" for name, n in counts.items())
            reader.wrong("inputs", f"inputs that hold one entry per row must agree on the number of rows: {found}")
        return next(iter(counts.values()), 1)

    @staticmethod
    def _names(specs: Sequence[TensorSpec]) -> str:
        return ", ".join(spec.name for spec in specs)


class _Reader:
    """Reads the tensors of one request and remembers what is wrong with them."""

    def __init__(self, request: pb.ModelInferRequest) -> None:
        self.violations: list[Violation] = []
        self._raw = request.raw_input_contents
        self.typed = not self._raw and bool(request.inputs)
        if self._raw and len(self._raw) != len(request.inputs):
            self.wrong("raw_input_contents", f"expected one entry per input ({len(request.inputs)}), found {len(self._raw)}")

    def wrong(self, path: str, description: str) -> None:
        self.violations.append(Violation(path, description))

    def read(self, i: int, tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, dtype: DType) -> Array | None:
        before = len(self.violations)
        if tensor.datatype != dtype.oip:
            self.wrong(f"inputs[{i}].datatype", f"{spec.name!r} is {dtype.oip}, found {tensor.datatype[:16]!r}")
        shape = tuple(tensor.shape)
        if not _fits(shape, spec):
            self.wrong(f"inputs[{i}].shape", f"{spec.name!r} is {list(spec.shape)} (-1 is 1 or more), found {list(shape)[:16]}")
        if self._raw and tensor.HasField("contents"):
            self.wrong(f"inputs[{i}].contents", "raw and typed contents are never mixed: send one of them")
        if len(self.violations) > before:
            return None
        return self._raw_array(i, shape, dtype) if self._raw else self._typed_array(i, tensor.contents, shape, dtype)

    def _raw_array(self, i: int, shape: tuple[int, ...], dtype: DType) -> Array | None:
        if i >= len(self._raw):
            return None  # reported once, for all
        content, count = self._raw[i], math.prod(shape)
        if dtype.name == "bytes":
            return self._raw_bytes(i, content, shape, count)
        if len(content) != count * dtype.size_bytes:
            expected = f"{list(shape)} {dtype.oip} takes {count * dtype.size_bytes} bytes"
            self.wrong(f"raw_input_contents[{i}]", f"{expected}, found {len(content)}")
            return None
        return np.frombuffer(content, dtype.numpy).reshape(shape)

    def _raw_bytes(self, i: int, content: bytes, shape: tuple[int, ...], count: int) -> Array | None:
        """BYTES: per element a 4-byte little-endian length, then that many bytes."""
        elements: list[bytes] = []
        at = 0
        while at + _LENGTH.size <= len(content) and len(elements) <= count:
            (length,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            elements.append(content[at : at + length])
            at += length
        if at != len(content) or len(elements) != count:
            self.wrong(f"raw_input_contents[{i}]", f"expected exactly {count} elements, each a 4-byte length and its bytes")
            return None
        return _objects(elements, shape)

    def _typed_array(self, i: int, contents: pb.InferTensorContents, shape: tuple[int, ...], dtype: DType) -> Array | None:
        path = f"inputs[{i}].contents"
        name = _TYPED_FIELD.get(dtype.name)
        if name is None:
            self.wrong(path, f"{dtype.oip} has no typed contents in the protocol: send it in raw_input_contents")
            return None
        filled = [descriptor.name for descriptor, _ in contents.ListFields()]
        if filled != [name]:
            self.wrong(path, f"{dtype.oip} belongs in {name}, found {', '.join(filled) or 'nothing'}")
            return None
        count, found = math.prod(shape), len(getattr(contents, name))
        if found != count:
            self.wrong(f"{path}.{name}", f"{list(shape)} takes {count} elements, found {found}")
            return None
        if dtype.name == "bytes":
            return _objects(list(contents.bytes_contents), shape)
        array = _unpack(packed.payload(contents.SerializeToString()), dtype)
        if array is None:
            self.wrong(f"{path}.{name}", f"holds values that {dtype.oip} does not")
            return None
        return array.reshape(shape)


def _fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    if len(shape) != len(spec.shape):
        return False
    return all(found >= 1 and wanted in (-1, found) for found, wanted in zip(shape, spec.shape, strict=True))


def _unpack(content: memoryview, dtype: DType) -> Array | None:
    """Return packed values as an array of `dtype`, or None where one does not fit it."""
    kind = np.dtype(dtype.numpy)
    if kind.kind in "fb":
        return np.frombuffer(content, kind)
    wide: Array = packed.decode_varints(content)
    if kind.kind == "i":
        wide = wide.view(np.int64)
    narrow = wide.astype(kind)
    return narrow if kind.itemsize == wide.itemsize or np.array_equal(narrow, wide) else None


def _write_typed(contents: pb.InferTensorContents, array: Array, dtype: DType) -> None:
    name = _TYPED_FIELD[dtype.name]
    flat = array.reshape(-1)
    if dtype.name == "bytes":
        contents.bytes_contents.extend(flat.tolist())
        return
    content = flat.tobytes() if array.dtype.kind in "fb" else packed.encode_varints(flat)
    contents.MergeFromString(packed.field(_FIELD_NUMBER[name], content))


def _write_bytes(array: Array) -> bytes:
    return b"".join(part for element in array.reshape(-1).tolist() for part in (_LENGTH.pack(len(element)), element))


def _objects(elements: list[bytes], shape: tuple[int, ...]) -> Array:
    """An object array, not one of fixed-width bytes: numpy strips trailing zeros off those."""
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(shape)
