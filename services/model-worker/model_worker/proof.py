"""What a model must show before it gets traffic: it gives the published answer, and batching does not change it.

Then it is warmed with real payloads of growing size, which also teaches the latency model what to promise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np

from model_worker.artifacts import Artifact, Sample
from model_worker.latency import LatencyModel
from model_worker.packed import Array
from model_worker.ragged import Layout, Piece
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, PlaitError
from plait.registry.artifact import ArtifactManifest

_WARM_ROWS: Final = 1024
_WARM_RUNS: Final = 4
_WARM_LIMIT_S: Final = 2.0
_MIN_TOLERANCE: Final = 1e-4  # sums of another order differ a little

Model = Callable[[Sequence[Array]], Sequence[Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """`joins`: requests can share a batch without changing each other's answers; `splits`: one can be computed in pieces."""

    joins: bool
    splits: bool
    latency: LatencyModel


def prove(model: Model, layout: Layout, artifact: Artifact, max_rows: int) -> Proven:
    """Check the model on its sample and warm it.

    Raises FailedPrecondition: SELF_TEST_FAILED, MODEL_EXECUTION_FAILED, MODEL_OUTPUT_WRONG.
    """
    sample = artifact.sample
    rows = _rows(sample, layout)
    whole = Piece(sample.inputs, 0, rows)
    [alone] = _run(model, layout, [whole])
    check_answer(artifact.manifest, artifact.sample, alone)
    tolerance = max(sample.tolerance, _MIN_TOLERANCE)
    joins = layout.growing and _joins(model, layout, whole, alone, tolerance)
    splits = layout.growing and _splits(model, layout, whole, alone, tolerance)
    latency = LatencyModel()
    _warm(model, layout, whole, latency, max_rows if joins else 1)
    return Proven(joins=joins, splits=splits, latency=latency)


def _run(model: Model, layout: Layout, pieces: Sequence[Piece]) -> list[tuple[Array, ...]]:
    try:
        return layout.divide(model(layout.join(pieces)), pieces)
    except PlaitError as error:
        raise FailedPrecondition(error.message, reason=error.reason) from error
    except Exception as error:
        raise FailedPrecondition(
            f"the model fails on its own sample ({type(error).__name__}): it must take 1 request as well as many",
            reason="MODEL_EXECUTION_FAILED",
        ) from error


def check_answer(manifest: ArtifactManifest, sample: Sample, outputs: Sequence[Array]) -> None:
    """Compare the answer to a sample with the signature and, where one is published, with what it must be.

    Raises FailedPrecondition: MODEL_OUTPUT_WRONG, SELF_TEST_FAILED.
    """
    for i, (spec, found) in enumerate(zip(manifest.outputs, outputs, strict=True)):
        fits = found.ndim == len(spec.shape) and all(want in (-1, size) for size, want in zip(found.shape, spec.shape, strict=True))
        if not fits or found.dtype != np.dtype(BY_NAME[spec.dtype].numpy):
            raise FailedPrecondition(
                f"output {spec.name} is {found.dtype} {list(found.shape)}, model.yaml says {spec.dtype} {list(spec.shape)}",
                reason="MODEL_OUTPUT_WRONG",
            )
        if sample.outputs is not None and not _close(found, sample.outputs[i], sample.tolerance):
            raise FailedPrecondition(
                f"the self test failed: output {spec.name} differs by {_distance(found, sample.outputs[i])} "
                f"from the published one (tolerance {sample.tolerance:g})",
                reason="SELF_TEST_FAILED",
            )


def _joins(model: Model, layout: Layout, whole: Piece, alone: tuple[Array, ...], tolerance: float) -> bool:
    """Say whether the sample's answer stays the same beside other requests: itself, and its first row alone."""
    companions = [Piece(whole.inputs, 0, 1), whole, whole]
    try:
        parts = _run(model, layout, companions)
    except FailedPrecondition:
        return False
    return all(_close(found, expected, tolerance) for part in parts[1:] for found, expected in zip(part, alone, strict=True))


def _splits(model: Model, layout: Layout, whole: Piece, alone: tuple[Array, ...], tolerance: float) -> bool:
    """Say whether computing the sample's rows in two pieces gives the same answer."""
    if whole.stop < 2:
        return False
    middle = whole.stop // 2
    try:
        parts = [_run(model, layout, [Piece(whole.inputs, a, b)])[0] for a, b in ((0, middle), (middle, whole.stop))]
    except FailedPrecondition:
        return False
    return all(_close(found, expected, tolerance) for found, expected in zip(layout.rejoin(parts), alone, strict=True))


def _warm(model: Model, layout: Layout, whole: Piece, latency: LatencyModel, max_rows: int) -> None:
    most = min(max_rows, _WARM_ROWS)
    started_s = time.monotonic()
    copies = 1
    while True:
        pieces = [whole] * copies
        for _ in range(_WARM_RUNS):
            before_s = time.monotonic()
            _run(model, layout, pieces)
            now_s = time.monotonic()
            latency.observe(whole.stop * copies, now_s - before_s, now_s)
        copies *= 4
        if whole.stop * copies > most or now_s - started_s > _WARM_LIMIT_S:
            return


def _rows(sample: Sample, layout: Layout) -> int:
    return next((len(array) for array, by_row in zip(sample.inputs, layout.row_inputs, strict=True) if by_row), 1)


def _close(found: Array, expected: Array, tolerance: float) -> bool:
    if found.dtype == expected.dtype == ml_dtypes.bfloat16:  # to numpy it is no float
        found, expected = found.astype(np.float32), expected.astype(np.float32)
    if found.dtype.kind not in "fc":
        return np.array_equal(found, expected)
    return found.shape == expected.shape and np.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _distance(found: Array, expected: Array) -> str:
    if found.shape != expected.shape or found.dtype.kind in "bO":
        return f"its shape or values, {list(found.shape)} against {list(expected.shape)},"
    with np.errstate(invalid="ignore"):  # of two infinities, or NaN: then the difference is NaN, which says it too
        return f"{np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64))):.3g}"
