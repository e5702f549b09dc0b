"""Open Inference tensors ↔ numpy, checked against a model's signature before anything runs.

Most requests are raw, complete and right; those take a short way that asks protobuf for as little as it can, because each question costs
about as much as a numpy call. Whatever it does not recognise is read again with care, which reports every problem of a request at once,
with its path. Raw contents become views of the message's bytes; typed contents are read packed (see `packed`).
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from model_worker import classification, packed, parameters
from model_worker.classification import NO_LABELS, Labels
from model_worker.contents import FIELD_NUMBER, TYPED_FIELD, Contents, bytes_elements
from model_worker.packed import Array
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME, DType
from plait.errors import InvalidArgument, Violation
from plait.registry.records import Signature, TensorSpec

_MAX_REMEMBERED: Final = 1024  # shapes, of which a model sees few
_MAX_VIOLATIONS: Final = 16
_MAX_VIOLATION_CHARS: Final = 3000  # altogether: they travel in a header, and clients take 8 KiB of those
_MAX_NAMES: Final = 10
_MAX_SPARE_TENSORS: Final = 100  # beyond what a model has; those up to here are named one by one
_SHOWN_DIMENSIONS: Final = 16
_SHOWN_CHARS: Final = 32

Shape = tuple[int, ...]


@dataclass(slots=True, kw_only=True)  # not frozen: that would triple the cost of making one, and one is made per request
class Query:
    """A request that was found right: input arrays in the signature's order, its rows, and what to answer in which form.

    `outputs`: positions in the signature, in the order asked. `classes`: how many classes of each of them to name instead of its values
    (0 = none), or empty. `priority`: 0 = the default, 1 the most urgent. `timeout_s`: what the request says it can wait, besides the
    call's deadline.
    """

    inputs: tuple[Array, ...]
    rows: int
    outputs: tuple[int, ...]
    typed: bool
    classes: tuple[int, ...] = ()
    priority: int = 0
    timeout_s: float | None = None


@dataclass(slots=True, kw_only=True)
class _Input:
    """What is looked up of an input for each request. `sizes`: bytes a shape takes, of shapes that fitted before."""

    spec: TensorSpec
    dtype: DType
    numpy: np.dtype[np.generic]
    by_row: bool
    plain: bool
    sizes: dict[Shape, int] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: TensorSpec) -> _Input:
        dtype = BY_NAME[spec.dtype]
        return cls(
            spec=spec,
            dtype=dtype,
            numpy=np.dtype(dtype.numpy),
            by_row=spec.per == "row",
            plain=dtype.name not in ("bytes", "bool"),
        )

    def size(self, shape: Shape) -> int | None:
        """Return the bytes a tensor of this shape takes, or None where the shape does not fit."""
        known = self.sizes.get(shape)
        if known is not None or not fits(shape, self.spec):
            return known
        size = math.prod(shape) * self.dtype.size_bytes
        if len(self.sizes) < _MAX_REMEMBERED:
            self.sizes[shape] = size
        return size


class Codec:
    """Reads requests and writes responses of one model; knows its signature, holds no state of a call."""

    def __init__(self, signature: Signature, labels: Labels = NO_LABELS) -> None:
        self._inputs = tuple(_Input.of(spec) for spec in signature.inputs)
        self._outputs = signature.outputs
        self._labels = labels
        self._batched = has_batch_dimension(signature)
        self._position = {spec.name: i for i, spec in enumerate(signature.inputs)}
        self._output_position = {spec.name: i for i, spec in enumerate(signature.outputs)}
        self._output_dtypes = tuple(BY_NAME[spec.dtype] for spec in signature.outputs)
        self._every_output = tuple(range(len(signature.outputs)))
        self._plain_outputs = all(spec.dtype != "bytes" for spec in signature.outputs)
        self._heads: dict[tuple[tuple[int, ...], tuple[Shape, ...]], bytes] = {}

    def decode(self, request: pb.ModelInferRequest) -> Query:
        """Return the request's tensors. Raises InvalidArgument (TENSOR_INVALID) with every violation found (of many, the first ones)."""
        return self._decode_usual(request) or self._decode_with_care(request)

    def encode(self, query: Query, outputs: Sequence[Array], response: pb.ModelInferResponse) -> None:
        """Write the wanted outputs into `response`: raw, unless the request itself was typed. FP16 and BF16 are always raw in the protocol,
        so a typed request for them is answered raw as a whole."""
        if self._plain_outputs and not query.typed and not query.classes:
            wanted = [outputs[i] for i in query.outputs]
            response.MergeFromString(self._head(query.outputs, tuple([array.shape for array in wanted])))
            for array in wanted:
                response.raw_output_contents.append(array.tobytes())
            return
        counts = query.classes or (0,) * len(query.outputs)
        answers = [self._answer(i, outputs[i], count) for i, count in zip(query.outputs, counts, strict=True)]
        typed = query.typed and all(dtype.name in TYPED_FIELD for _, dtype in answers)
        for i, (array, dtype) in zip(query.outputs, answers, strict=True):
            tensor = response.outputs.add(name=self._outputs[i].name, datatype=dtype.oip, shape=array.shape)
            if typed:
                _write_typed(tensor.contents, array, dtype)
            else:
                response.raw_output_contents.append(bytes_elements(array) if dtype.name == "bytes" else array.tobytes())

    def _decode_usual(self, request: pb.ModelInferRequest) -> Query | None:
        """Read a request that is raw, names each input in order and has no parameters; None for any other."""
        tensors, raw = request.inputs, request.raw_input_contents
        outputs = self._plainly_requested(request.outputs) if request.outputs else self._every_output
        if outputs is None or len(tensors) != len(self._inputs) or len(raw) != len(tensors) or request.parameters:
            return None
        arrays = []
        rows = 0
        for i, known in enumerate(self._inputs):  # by index, and slices below: protobuf's iterators cost twice that
            tensor, content = tensors[i], raw[i]
            if not known.plain or tensor.name != known.spec.name or tensor.datatype != known.dtype.oip or tensor.HasField("contents"):
                return None
            sizes = tensor.shape
            if len(sizes) != len(known.spec.shape):
                return None
            shape = tuple(sizes[:])
            size = known.size(shape)
            if not size or size != len(content):  # of no bytes at all a shape can be larger than numpy takes
                return None
            if known.by_row and rows not in (0, rows := shape[0]):
                return None
            arrays.append(np.ndarray(shape, known.numpy, content))
        return Query(inputs=tuple(arrays), rows=rows or 1, outputs=outputs, typed=False)

    def _plainly_requested(self, requested: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[int, ...] | None:
        """Return the positions of outputs asked for by name alone, each once; None where any is asked for otherwise."""
        if len(requested) > len(self._outputs):
            return None
        wanted: list[int] = []
        for i in range(len(requested)):
            output = requested[i]
            position = self._output_position.get(output.name)
            if position is None or position in wanted or output.parameters:
                return None
            wanted.append(position)
        return tuple(wanted)

    def _decode_with_care(self, request: pb.ModelInferRequest) -> Query:
        reader = _Reader(request)
        self._check_counts(request, reader)
        arrays: list[Array | None] = [None] * len(self._inputs)
        for i, tensor in enumerate(request.inputs):
            position = self._position.get(tensor.name)
            if position is None:
                reader.wrong(f"inputs[{i}].name", f"the model has no such input; it takes {_names(k.spec for k in self._inputs)}")
            elif arrays[position] is not None:
                reader.wrong(f"inputs[{i}].name", "the input is given twice")
            else:
                arrays[position] = reader.read(i, tensor, self._inputs[position])
        self._check_complete(request, reader)
        outputs, classes = self._requested(request, reader)
        priority, timeout_s, problems = parameters.schedule(request.parameters)
        reader.add(problems)
        rows = self._rows(arrays, reader) if not reader.violations else 0
        reader.raise_if_wrong()
        return Query(
            inputs=tuple(a for a in arrays if a is not None),
            rows=rows,
            outputs=outputs,
            typed=reader.typed,
            classes=classes,
            priority=priority,
            timeout_s=timeout_s,
        )

    def _check_counts(self, request: pb.ModelInferRequest, reader: _Reader) -> None:
        """Refuse a message of millions of tensors before each of them is looked at: others wait for the event loop."""
        for name, given, known in (("inputs", request.inputs, self._inputs), ("outputs", request.outputs, self._outputs)):
            if len(given) > _MAX_SPARE_TENSORS + len(known):
                reader.wrong(name, f"{len(given)} are given; the model has {len(known)}")
                reader.raise_if_wrong()

    def _check_complete(self, request: pb.ModelInferRequest, reader: _Reader) -> None:
        given = {tensor.name for tensor in request.inputs}
        for known in self._inputs:
            if known.spec.name not in given:
                reader.wrong("inputs", f"{known.spec.name!r} ({known.dtype.oip} {list(known.spec.shape)}) is missing")

    def _requested(self, request: pb.ModelInferRequest, reader: _Reader) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the positions of the outputs asked for, and how many classes of each (empty = of none)."""
        wanted: dict[int, int] = {}
        for i, output in enumerate(request.outputs):
            position = self._output_position.get(output.name)
            if position is None:
                reader.wrong(f"outputs[{i}].name", f"the model has no such output; it gives {_names(self._outputs)}")
            elif position in wanted:
                reader.wrong(f"outputs[{i}].name", "the output is asked for twice")
            else:
                wanted[position], problems = parameters.classes(output.parameters, f"outputs[{i}]")
                reader.add(problems)
                if wanted[position] and not classification.can_rank(self._outputs[position].dtype):
                    reader.wrong(f"outputs[{i}]", f"{self._output_dtypes[position].oip} cannot be classified: it has no scores")
        if not wanted:
            return self._every_output, ()
        return tuple(wanted), tuple(wanted.values()) if any(wanted.values()) else ()

    def _rows(self, arrays: Sequence[Array | None], reader: _Reader) -> int:
        counts = {
            known.spec.name: len(array)
            for known, array in zip(self._inputs, arrays, strict=True)
            if array is not None and known.by_row and array.ndim
        }
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} has {n}" for name, n in list(counts.items())[:_MAX_NAMES])
            reader.wrong("inputs", f"inputs that hold one entry per row must agree on the number of rows: {found}")
        return next(iter(counts.values()), 1)

    def _head(self, wanted: tuple[int, ...], shapes: tuple[Shape, ...]) -> bytes:
        """Return a serialized response that holds nothing but names, types and shapes of its outputs."""
        known = self._heads.get((wanted, shapes))
        if known is not None:
            return known
        response = pb.ModelInferResponse()
        for i, shape in zip(wanted, shapes, strict=True):
            response.outputs.add(name=self._outputs[i].name, datatype=self._output_dtypes[i].oip, shape=shape)
        head = response.SerializeToString()
        if len(self._heads) < _MAX_REMEMBERED:
            self._heads[wanted, shapes] = head
        return head

    def _answer(self, position: int, array: Array, count: int) -> tuple[Array, DType]:
        if not count:
            return array, self._output_dtypes[position]
        labels = self._labels.get(self._outputs[position].name, ())
        return classification.top(array, count, by_row=self._batched, labels=labels), BY_NAME["bytes"]


def has_batch_dimension(signature: Signature) -> bool:
    """Say whether every tensor begins with one and the same variable dimension, which is what other servers call a batch."""
    return all(t.per == "row" and t.shape[:1] == (-1,) for t in (*signature.inputs, *signature.outputs))


def fits(shape: Shape, spec: TensorSpec) -> bool:
    """Say whether a tensor's shape is one the signature allows; a variable dimension is 1 or more."""
    if len(shape) != len(spec.shape):
        return False
    return all(found >= 1 if wanted == -1 else found == wanted for found, wanted in zip(shape, spec.shape, strict=True))


class _Reader:
    """Reads the tensors of one request and remembers what is wrong with them."""

    def __init__(self, request: pb.ModelInferRequest) -> None:
        self.violations: list[Violation] = []
        self._raw = request.raw_input_contents
        self._found = 0
        self._chars = 0
        self.typed = not self._raw and bool(request.inputs)
        if self._raw and len(self._raw) != len(request.inputs):
            self.wrong("raw_input_contents", f"expected one entry per input ({len(request.inputs)}), found {len(self._raw)}")

    def wrong(self, path: str, description: str) -> None:
        self.add([Violation(path, description)])

    def add(self, problems: Iterable[Violation]) -> None:
        for problem in problems:
            self._found += 1
            self._chars += len(problem.field) + len(problem.description)
            if len(self.violations) < _MAX_VIOLATIONS and (self._chars <= _MAX_VIOLATION_CHARS or not self.violations):
                self.violations.append(problem)

    def raise_if_wrong(self) -> None:
        if not self.violations:
            return
        first, more = self.violations[0], self._found - 1
        raise InvalidArgument(
            f"the request does not fit the model's signature: {first.field}: {first.description}{f' (and {more} more)' if more else ''}",
            reason="TENSOR_INVALID",
            violations=self.violations,
        )

    def read(self, i: int, tensor: pb.ModelInferRequest.InferInputTensor, known: _Input) -> Array | None:
        before, spec, dtype = self._found, known.spec, known.dtype
        if tensor.datatype != dtype.oip:
            self.wrong(f"inputs[{i}].datatype", f"{spec.name!r} is {dtype.oip}, found {tensor.datatype[:16]!r}")
        shape = tuple(tensor.shape[: len(spec.shape) + _SHOWN_DIMENSIONS])
        if not fits(shape, spec):
            shown = list(shape[:_SHOWN_DIMENSIONS])
            self.wrong(f"inputs[{i}].shape", f"{spec.name!r} is {list(spec.shape)} (-1 is 1 or more), found {shown}")
        if self._raw and tensor.HasField("contents"):
            self.wrong(f"inputs[{i}].contents", "raw and typed contents are never mixed: send one of them")
        self.add(parameters.shared_memory(tensor.parameters, f"inputs[{i}]"))
        if self._found > before or (self._raw and i >= len(self._raw)):  # the latter was reported once, for all
            return None
        contents = Contents(shape=shape, dtype=dtype)
        try:
            return contents.raw(self._raw[i]) if self._raw else contents.typed(tensor.contents)
        except ValueError as problem:
            where = f"raw_input_contents[{i}]" if self._raw else f"inputs[{i}].contents"
            self.wrong(where, str(problem))
            return None


def _write_typed(contents: pb.InferTensorContents, array: Array, dtype: DType) -> None:
    name = TYPED_FIELD[dtype.name]
    flat = array.reshape(-1)
    if dtype.name == "bytes":
        contents.bytes_contents.extend(flat.tolist())
        return
    content = flat.tobytes() if array.dtype.kind in "fb" else packed.encode_varints(flat)
    contents.MergeFromString(packed.field(FIELD_NUMBER[name], content))


def _names(specs: Iterable[TensorSpec]) -> str:
    names = [spec.name[:_SHOWN_CHARS] for spec in specs]
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
