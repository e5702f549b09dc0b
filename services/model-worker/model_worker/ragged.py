"""Requests of different callers as one batch, and its outputs as answers again.

A ragged batch (the idea of TensorFlow's RaggedTensor): inputs with one entry per row are concatenated, those with one per request are
stacked, and `row_splits` says which rows belong to which request, so that nothing of the user's side is ever copied per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_worker.packed import Array
from plait.dtypes import BY_NAME
from plait.errors import Internal, InvalidArgument
from plait.registry.records import Signature

Arrays = tuple[Array, ...]


class Ragged:
    """Joins and splits the tensors of one model; stateless.

    `row_splits`: whether the model takes the extra int64 [requests + 1] input after the others.
    """

    def __init__(self, signature: Signature, *, row_splits: bool) -> None:
        self._per_row = tuple(spec.per == "row" for spec in signature.inputs)
        self._outputs = tuple((spec, spec.per == "row") for spec in signature.outputs)
        self._dtypes = tuple(np.dtype(BY_NAME[spec.dtype].numpy) for spec in signature.outputs)
        self._row_splits = row_splits
        self._variable = any(-1 in spec.shape[1:] for spec in signature.inputs)

    def kind(self, inputs: Arrays) -> tuple[tuple[int, ...], ...] | None:
        """Return what requests must have in common to be joined: nothing, unless dimensions besides the first vary."""
        return tuple(array.shape[1:] for array in inputs) if self._variable else None

    def chunks(self, inputs: Arrays, rows: int, max_rows: int) -> list[tuple[Arrays, int]]:
        """Return a request as pieces of at most `max_rows`, which are views; per-request inputs go with each piece.

        Raises InvalidArgument (TOO_MANY_ROWS) where the model answers something about the request as a whole: that cannot be cut.
        """
        if rows <= max_rows:
            return [(inputs, rows)]
        if not all(per_row for _, per_row in self._outputs):
            message = f"the request has {rows} rows, the model takes at most {max_rows} at once: send fewer"
            raise InvalidArgument(message, reason="TOO_MANY_ROWS")
        starts = range(0, rows, max_rows)
        return [(self._cut(inputs, start, start + max_rows), min(max_rows, rows - start)) for start in starts]

    def rejoin(self, pieces: Sequence[Arrays]) -> Arrays:
        """Return the outputs of a request that was cut."""
        return pieces[0] if len(pieces) == 1 else tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))

    def join(self, requests: Sequence[Arrays], rows: Sequence[int]) -> list[Array]:
        """Return the model's inputs; a lone request's own arrays, uncopied."""
        joined: list[Any] = list(requests[0]) if len(requests) == 1 else [np.concatenate(parts) for parts in zip(*requests, strict=True)]
        if self._row_splits:
            splits = np.zeros(len(rows) + 1, np.int64)
            np.cumsum(rows, out=splits[1:])
            joined.append(splits)
        return joined

    def split(self, outputs: Sequence[Array], rows: Sequence[int]) -> list[Arrays]:
        """Return each request's outputs, as views. Raises Internal (MODEL_OUTPUT_WRONG) where the model's sizes are not the batch's."""
        self._check(outputs, rows)
        if len(rows) == 1:
            return [tuple(outputs)]
        bounds = np.cumsum([0, *rows]).tolist()
        return [self._share(outputs, i, slice(bounds[i], bounds[i + 1])) for i in range(len(rows))]

    def _share(self, outputs: Sequence[Array], request: int, rows: slice) -> Arrays:
        own = slice(request, request + 1)
        return tuple(output[rows if per_row else own] for output, (_, per_row) in zip(outputs, self._outputs, strict=True))

    def _cut(self, inputs: Arrays, start: int, stop: int) -> Arrays:
        return tuple(array[start:stop] if per_row else array for array, per_row in zip(inputs, self._per_row, strict=True))

    def _check(self, outputs: Sequence[Array], rows: Sequence[int]) -> None:
        if len(outputs) != len(self._outputs):
            raise _wrong(f"it gave {len(outputs)} outputs, its signature says {len(self._outputs)}")
        for output, (spec, per_row), dtype in zip(outputs, self._outputs, self._dtypes, strict=True):
            expected = (sum(rows) if per_row else len(rows), *spec.shape[1:])
            if output.dtype != dtype or not _fits(output.shape, expected):
                found = f"{output.dtype} {list(output.shape)}"
                raise _wrong(f"its output {spec.name!r} is {found}, expected {spec.dtype} {list(expected)}")


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (-1, f) for f, e in zip(shape, expected, strict=True))


def _wrong(what: str) -> Internal:
    return Internal(f"the model does not keep its signature: {what}; publish a version that does", reason="MODEL_OUTPUT_WRONG")
