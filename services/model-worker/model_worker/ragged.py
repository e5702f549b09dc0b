"""Many requests as one call of the model, and its answer cut back into theirs.

Rows are concatenated; what is per request is stacked, once per request however many rows it has, and row splits say which rows are
whose, as in TensorFlow's RaggedTensor (https://www.tensorflow.org/guide/ragged_tensor). A lone request is passed on untouched.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from model_worker.packed import Array
from plait.errors import Internal
from plait.registry.records import Batching, Signature


@dataclass(slots=True)  # as `Share`: not frozen, for its price
class Piece:
    """Rows [start, stop) of one request's inputs."""

    inputs: tuple[Array, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which inputs and outputs grow with the rows, and whether row splits are the last argument."""

    row_inputs: tuple[bool, ...]
    row_outputs: tuple[bool, ...]
    row_splits: bool
    growing: bool

    @classmethod
    def of(cls, signature: Signature, batching: Batching) -> Layout:
        """Read it from a signature. `growing` says whether the shapes allow several requests, or parts of one, in a call."""
        rows = [t for t in (*signature.inputs, *signature.outputs) if t.per == "row"]
        requests = [t for t in signature.inputs if t.per == "request"]
        return cls(
            row_inputs=tuple(t.per == "row" for t in signature.inputs),
            row_outputs=tuple(t.per == "row" for t in signature.outputs),
            row_splits=bool(batching.row_splits),
            growing=all(t.shape[0] == -1 for t in rows) and all(t.shape[0] == 1 for t in requests),
        )

    def kind(self, inputs: Sequence[Array]) -> Hashable:
        """Return what two requests must have in common to share a batch: every dimension but the first."""
        return tuple([array.shape[1:] for array in inputs])  # a list, not a generator: this is per request

    def join(self, pieces: Sequence[Piece]) -> tuple[Array, ...]:
        """Return the model's arguments, in the signature's order, row splits (int64 [requests + 1]) last where it takes them."""
        if len(pieces) == 1:
            piece = pieces[0]
            joined = tuple(
                array[piece.start : piece.stop] if by_row and len(array) != piece.stop - piece.start else array
                for array, by_row in zip(piece.inputs, self.row_inputs, strict=True)
            )
        else:
            joined = tuple(
                np.concatenate([p.inputs[i][p.start : p.stop] if by_row else p.inputs[i] for p in pieces])
                for i, by_row in enumerate(self.row_inputs)
            )
        return (*joined, self._splits(pieces)) if self.row_splits else joined

    def divide(self, outputs: Sequence[Array], pieces: Sequence[Piece]) -> list[tuple[Array, ...]]:
        """Return each piece's part of the outputs, as views. Raises Internal (MODEL_OUTPUT_WRONG) where they do not add up."""
        if len(outputs) != len(self.row_outputs):
            raise _wrong(f"{len(outputs)} outputs instead of {len(self.row_outputs)}")
        if not self.growing:
            return [tuple(outputs)]
        rows = sum(p.stop - p.start for p in pieces)
        for i, (output, by_row) in enumerate(zip(outputs, self.row_outputs, strict=True)):
            expected = rows if by_row else len(pieces)
            if output.ndim == 0 or len(output) != expected:
                raise _wrong(f"output {i} of shape {list(output.shape)}, where {expected} entries were due")
        if len(pieces) == 1:
            return [tuple(outputs)]
        parts: list[tuple[Array, ...]] = []
        at = 0
        for k, piece in enumerate(pieces):
            end = at + piece.stop - piece.start
            parts.append(tuple(o[at:end] if by_row else o[k : k + 1] for o, by_row in zip(outputs, self.row_outputs, strict=True)))
            at = end
        return parts

    def rejoin(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """Return the outputs of a request that ran in pieces: rows in order; what is per request is the same in each, so the first."""
        if len(parts) == 1:
            return parts[0]
        return tuple(np.concatenate([p[i] for p in parts]) if by_row else parts[0][i] for i, by_row in enumerate(self.row_outputs))

    @staticmethod
    def _splits(pieces: Sequence[Piece]) -> Array:
        splits = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([p.stop - p.start for p in pieces], out=splits[1:])
        return splits


def _wrong(found: str) -> Internal:
    return Internal(f"the model answered {found}: its model.yaml does not describe it", reason="MODEL_OUTPUT_WRONG")
