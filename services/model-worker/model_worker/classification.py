"""The classification extension: of each row the k highest values, as text that names the class.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from model_worker.artifacts import Artifact
from model_worker.packed import Array
from plait.errors import FailedPrecondition

Labels = Mapping[str, tuple[str, ...]]  # by output: the name of class 0, 1, …
NO_LABELS: Labels = MappingProxyType({})


def can_rank(dtype: str) -> bool:
    """Say whether values of an element type (by the manifest's name) have an order that means a score."""
    return dtype not in ("bool", "bytes")


def load_labels(artifact: Artifact) -> Labels:
    """Return the class names of an artifact's label files, one a line. Raises FailedPrecondition (LABELS_UNUSABLE, ARTIFACT_CORRUPT)."""
    manifest = artifact.manifest
    outputs = {t.name for t in manifest.outputs}
    found = {}
    for output, file in manifest.labels.items():
        if output not in outputs or file not in manifest.files:
            raise FailedPrecondition(
                f"labels.{output}: {file} must be a file of the artifact and {output} an output of the model", reason="LABELS_UNUSABLE"
            )
        try:
            found[output] = tuple(artifact.read(file).decode().splitlines())
        except UnicodeDecodeError as error:
            raise FailedPrecondition(f"labels.{output}: {file} is not UTF-8 text", reason="LABELS_UNUSABLE") from error
    return MappingProxyType(found)


def top(array: Array, count: int, *, by_row: bool, labels: Sequence[str] = ()) -> npt.NDArray[np.object_]:
    """Return the `count` highest values of an output as bytes "value:index[:label]", highest first, of equal ones the lower index first.

    `by_row`: the first dimension is the batch's and the answer [rows, k]; else all values compete and the answer is [k]; k is at most the
    number of values there are. NaN counts as the lowest.
    """
    values = array.reshape(len(array), -1) if by_row else array.reshape(1, -1)
    width = values.shape[1]
    if values.dtype.kind not in "iu":  # floats, of which ml_dtypes' are kind "V"
        values = values.astype(np.float64)
    sortable = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    # An ascending stable sort of the mirrored rows, mirrored again: descending, and ties keep their order without negating integers.
    order = (width - 1 - np.argsort(sortable[:, ::-1], axis=1, kind="stable"))[:, ::-1][:, :count]
    picked = np.take_along_axis(values, order, axis=1)
    form = "%f:%d" if values.dtype.kind == "f" else "%d:%d"
    texts = [form % pair for pair in zip(picked.ravel().tolist(), order.ravel().tolist(), strict=True)]
    if labels:
        names = [f":{labels[index]}" if index < len(labels) else "" for index in order.ravel().tolist()]
        texts = [text + name for text, name in zip(texts, names, strict=True)]
    answer = np.empty(len(texts), np.object_)
    answer[:] = [text.encode() for text in texts]
    return answer.reshape(order.shape if by_row else (-1,))
