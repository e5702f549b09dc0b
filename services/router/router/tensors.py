"""Tensors on their way through: bytes are handed on as they came, only names and dtypes change between the two wires."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from plait.dtypes import BY_NAME, BY_OIP
from plait.errors import FailedPrecondition, Unavailable
from plait.registry.places import Place
from router.route_table import Arm

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2
    from plait.api.types.v1 import types_pb2

_FLOATS: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_RETRY_S: Final = 0.1


def fill_infer(request: Any, arm: Arm, tensors: Mapping[str, types_pb2.Tensor], outputs: Iterable[str], request_id: str) -> None:
    """Fill a ModelInferRequest in place: the arm's inputs in signature order, entry i of the raw contents belonging to input i.

    Raises Unavailable (FEATURES_UNAVAILABLE) when an input is missing: feature-retrieval then lives under another revision.
    """
    request.model_name = arm.model
    request.model_version = arm.version
    request.id = request_id
    for item in arm.inputs:
        tensor = tensors.get(item.name)
        if tensor is None:
            raise Unavailable(
                f"feature-retrieval did not answer input {item.name!r}: it may not have seen the newest feature set yet; retry",
                reason="FEATURES_UNAVAILABLE",
                retry_after_s=_RETRY_S,
            )
        request.inputs.add(name=item.name, datatype=item.oip, shape=tensor.shape)
        request.raw_input_contents.append(tensor.data)
    for name in outputs:
        request.outputs.add(name=name)


def scores_of(response: inference_pb2.ModelInferResponse, name: str, rows: int) -> NDArray[np.float32]:
    """Return the scores [rows] as float32: a view of the answer's bytes where they are FP32.

    Raises FailedPrecondition (SIGNATURE_MISMATCH) when the worker answered anything but one float per row.
    """
    index = next((i for i, output in enumerate(response.outputs) if output.name == name), -1)
    if not 0 <= index < len(response.raw_output_contents):
        raise _misfit(f"no output {name!r}")
    output = response.outputs[index]
    raw = response.raw_output_contents[index]
    layout = _FLOATS.get(output.datatype)
    shape = tuple(output.shape)
    if layout is None or shape not in ((rows,), (rows, 1)) or len(raw) != rows * np.dtype(layout).itemsize:
        raise _misfit(f"{output.datatype} {list(shape)} in {len(raw)} bytes for output {name!r}")
    with np.errstate(over="ignore"):  # (a double beyond float32 becomes infinite, which the answer tells)
        return np.frombuffer(raw, layout).astype(np.float32, copy=False)


def ids_of(response: inference_pb2.ModelInferResponse, name: str) -> list[int] | list[str]:
    """Return the ids in an output, in its order; negative numbers and empty texts are padding.

    Raises FailedPrecondition (SIGNATURE_MISMATCH) when the worker answered anything but INT64 or texts.
    """
    index = next((i for i, output in enumerate(response.outputs) if output.name == name), -1)
    if not 0 <= index < len(response.raw_output_contents):
        raise _misfit(f"no output {name!r}")
    output, raw = response.outputs[index], response.raw_output_contents[index]
    if output.datatype == "INT64" and len(raw) == math.prod(output.shape) * 8:
        return [number for number in np.frombuffer(raw, "<i8").tolist() if number >= 0]
    if output.datatype == "BYTES":
        try:
            return [text for text in _texts(raw) if text]
        except ValueError:
            pass
    raise _misfit(f"{output.datatype} {list(output.shape)} in {len(raw)} bytes for ids {name!r}")


def _texts(raw: bytes) -> Iterator[str]:
    """Yield the elements of a BYTES tensor, each led by its length (4 bytes, little-endian). Raises ValueError where they do not add up."""
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if end > len(raw):
            raise ValueError("an element ends beyond the tensor")
        yield raw[at + 4 : end].decode()
        at = end


def column_of(tensor: types_pb2.Tensor, place: Place, rows: int) -> NDArray[np.float32]:
    """Return one column [rows] of a feature tensor as float32; what is not known, or not finite, is as low as the lowest that is."""
    with np.errstate(over="ignore"):
        column = np.frombuffer(tensor.data, BY_NAME[place.dtype].numpy).reshape(rows, -1)[:, place.column].astype(np.float32)
    known = np.isfinite(column)
    return column if known.all() else np.where(known, column, column[known].min() if known.any() else 0).astype(np.float32)


def copy_outputs(response: inference_pb2.ModelInferResponse, into: Any) -> None:
    """Append the outputs of an answer as our tensors, bytes as they came; raises as `scores_of`."""
    if len(response.outputs) != len(response.raw_output_contents):
        raise _misfit(f"{len(response.raw_output_contents)} raw contents for {len(response.outputs)} outputs")
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = BY_OIP.get(output.datatype)
        if dtype is None or (dtype.size_bytes and len(raw) != math.prod(output.shape) * dtype.size_bytes):
            raise _misfit(f"{output.datatype} {list(output.shape)} in {len(raw)} bytes for output {output.name!r}")
        into.add(name=output.name, dtype=dtype.number, shape=output.shape, data=raw)


def parameter(response: inference_pb2.ModelInferResponse, name: str) -> int:
    """Return an int64 parameter of the answer, 0 where there is none."""
    return response.parameters[name].int64_param if name in response.parameters else 0


def _misfit(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the model-worker answered {what}, which is not what the model's signature says: publish a version whose signature is true",
        reason="SIGNATURE_MISMATCH",
    )
