"""What a model must show before it gets traffic: it gives the published answer, and batching does not change it.

Then it is warmed with real payloads: at every size that batches are padded to, on every device and in every process, so that no request pays
for what is done once per size (a recorded graph, a compiler's specialisation, an allocation). That also teaches the latency model what to promise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import ml_dtypes
import numpy as np

from model_worker.artifacts import Artifact, Sample
from model_worker.backends import buckets
from model_worker.latency import LatencyModel
from model_worker.packed import Array
from model_worker.ragged import Layout, Piece
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, PlaitError
from plait.registry.artifact import ArtifactManifest

OUT_OF_MEMORY: Final = "OUT_OF_DEVICE_MEMORY"
_WARM_ROWS: Final = 1024
_WARM_RUNS: Final = 4
_WARM_LIMIT_S: Final = 2.0
# Sums of another order differ a little, by some of the smallest steps (2^-11, 2^-8) of the type that is computed in.
_MIN_TOLERANCE: Final = {"": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}

T = TypeVar("T")
Model = Callable[[Sequence[Array]], Sequence[Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """`joins`: requests can share a batch without changing each other's answers; `splits`: one can be computed in pieces."""

    joins: bool
    splits: bool
    latency: LatencyModel


def prove(model: Model, layout: Layout, artifact: Artifact, max_rows: int, *, others: Sequence[Model] = ()) -> Proven:
    """Check the model on its sample and warm it; `others` are the same model on other devices or in other processes, and must answer the same.

    Raises FailedPrecondition: SELF_TEST_FAILED, MODEL_EXECUTION_FAILED, MODEL_OUTPUT_WRONG, OUT_OF_DEVICE_MEMORY.
    """
    sample, manifest = artifact.sample, artifact.manifest
    whole = Piece(sample.inputs, 0, _rows(sample, layout))
    [alone] = _run(model, layout, [whole])
    check_answer(manifest, sample, alone)
    tolerance = max(sample.tolerance, _MIN_TOLERANCE[manifest.execution.autocast])
    joins = layout.growing and _joins(model, layout, whole, alone, tolerance)
    splits = layout.growing and _splits(model, layout, whole, alone, tolerance)
    warming = Warming(layout=layout, whole=whole, sizes=_padded_to(manifest, max_rows) if joins else (), max_rows=max_rows if joins else 1)
    latency = LatencyModel()
    for each in (model, *others):
        if each is not model:
            check_answer(manifest, sample, _run(each, layout, [whole])[0])
        # An answer that padding changes is no better than one that company changes: such a model gets neither.
        joins = warming.run(each, latency, alone, tolerance) and joins
    return Proven(joins=joins, splits=splits, latency=latency)


def _padded_to(manifest: ArtifactManifest, max_rows: int) -> tuple[int, ...]:
    """Return the sizes that batches will be padded to."""
    return tuple(size for size in manifest.batching.buckets if size <= max_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warming:
    """What every copy of a model is warmed with: its sample, padded to each of `sizes`, then joined to itself up to `max_rows`."""

    layout: Layout
    whole: Piece
    sizes: tuple[int, ...]
    max_rows: int

    def run(self, model: Model, latency: LatencyModel, alone: Sequence[Array], tolerance: float) -> bool:
        """Warm one copy and observe how long it takes; say whether the answers to padded batches were those to the sample alone.

        The largest size comes first, since what it takes of a device's memory serves the smaller ones too. However slow the model is, each
        size is run once in every place the model computes in (`lanes`, which calls in a row visit in turn).
        """
        places, same = getattr(model, "lanes", 1), True
        started_s = time.monotonic()
        for size in reversed(self.sizes):
            for number in range(max(places, _WARM_RUNS)):
                if number >= places and time.monotonic() - started_s > _WARM_LIMIT_S:
                    break
                same = self._padded(model, size, latency, alone, tolerance) and same
        copies = 1
        while copies == 1 or (self.whole.stop * copies <= min(self.max_rows, _WARM_ROWS) and time.monotonic() - started_s <= _WARM_LIMIT_S):
            if not self.sizes or self.whole.stop * copies > self.sizes[-1]:  # smaller batches are padded, and so never of this size
                try:
                    self._joined(model, copies, latency)
                except FailedPrecondition as error:
                    if error.reason != OUT_OF_MEMORY or copies == 1:
                        raise
                    return same  # no batch has to be that large: one that does not fit is halved
            copies *= 4
        return same

    def _padded(self, model: Model, size: int, latency: LatencyModel, alone: Sequence[Array], tolerance: float) -> bool:
        rows = min(self.whole.stop, size)
        joined = self.layout.join([Piece(self.whole.inputs, 0, rows)])
        padded = buckets.pad(joined, self.layout, rows, size)
        before_s = time.monotonic()
        outputs = _explained(lambda: model(padded))
        now_s = time.monotonic()
        latency.observe(size, now_s - before_s, now_s)
        if rows < self.whole.stop:
            return True
        answer = buckets.cut(outputs, self.layout, rows, 1)
        return all(_close(found, expected, tolerance) for found, expected in zip(answer, alone, strict=True))

    def _joined(self, model: Model, copies: int, latency: LatencyModel) -> None:
        for _ in range(_WARM_RUNS):
            before_s = time.monotonic()
            _run(model, self.layout, [self.whole] * copies)
            now_s = time.monotonic()
            latency.observe(self.whole.stop * copies, now_s - before_s, now_s)


def _run(model: Model, layout: Layout, pieces: Sequence[Piece]) -> list[tuple[Array, ...]]:
    return _explained(lambda: layout.divide(model(layout.join(pieces)), pieces))


def _explained(run: Callable[[], T]) -> T:
    try:
        return run()
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
