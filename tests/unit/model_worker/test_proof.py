"""What a model shows before it gets traffic, with models that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model_worker.artifacts import Artifact, Sample
from model_worker.proof import Proven, prove
from model_worker.ragged import Layout
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=(-1, 2))
Y = TensorSpec(name="y", dtype="float32", shape=(-1,))
ROWS = np.array([[1, 2], [3, 4], [5, 6], [7, 9]], np.float32)
Arrays = Sequence[np.ndarray[Any, Any]]


def show(
    model: Callable[[Arrays], Any],
    *,
    outputs: Any = None,
    dtype: Any = np.float32,
    tolerance: float = 1e-4,
    x: TensorSpec = X,
    y: TensorSpec = Y,
    max_rows: int = 64,
) -> Proven:
    manifest = ArtifactManifest(name="m", format="torchscript", entry="model.pt", inputs=(x,), outputs=(y,))
    sample = Sample(inputs=(ROWS.copy(),), outputs=None if outputs is None else (np.array(outputs, dtype),), tolerance=tolerance)
    layout = Layout.of(manifest.signature, manifest.batching)
    return prove(model, layout, Artifact(manifest=manifest, folder=Path(), sample=sample), max_rows)


def sums(inputs: Arrays) -> list[Any]:
    return [inputs[0].sum(1)]


def refused(model: Callable[[Arrays], Any], **more: Any) -> str:
    with pytest.raises(FailedPrecondition) as failed:
        show(model, **more)
    return failed.value.reason


def test_a_model_that_works_row_by_row_joins_and_splits_and_teaches_its_latency() -> None:
    proven = show(sums, outputs=[3, 7, 11, 16])
    assert (proven.joins, proven.splits) == (True, True)
    assert "over 12 batches" in repr(proven.latency)  # 4, 16 and 64 rows, four times each


def test_a_wrong_answer_is_refused_and_a_close_one_is_not() -> None:
    assert refused(sums, outputs=[3, 7, 11, 17]) == "SELF_TEST_FAILED"
    assert refused(sums, outputs=[3, 7, 11]) == "SELF_TEST_FAILED"
    assert show(sums, outputs=[3, 7, 11, 17], tolerance=0.1).joins


def test_a_nan_where_a_number_is_due_is_refused() -> None:
    assert refused(lambda i: [i[0].sum(1) * np.nan], outputs=[3, 7, 11, 16]) == "SELF_TEST_FAILED"


@pytest.mark.parametrize(
    "model",
    [
        lambda i: [i[0].sum(1).astype(np.float64)],
        lambda i: [i[0]],
        lambda i: [i[0].sum(1), i[0].sum(1)],
        lambda i: [i[0].sum(1)[:-1]],
    ],
    ids=["dtype", "dimensions", "count", "rows"],
)
def test_an_answer_the_signature_does_not_describe_is_refused(model: Any) -> None:
    assert refused(model) == "MODEL_OUTPUT_WRONG"


def test_a_fixed_dimension_of_an_answer_is_checked() -> None:
    wide = TensorSpec(name="y", dtype="float32", shape=(-1, 3))
    assert refused(lambda i: [i[0]], y=wide) == "MODEL_OUTPUT_WRONG"
    assert show(lambda i: [i[0] * 1], y=TensorSpec(name="y", dtype="float32", shape=(-1, 2))).joins


def test_a_model_that_fails_on_its_own_sample_is_refused() -> None:
    def broken(inputs: Arrays) -> Any:
        raise RuntimeError("no")

    assert refused(broken) == "MODEL_EXECUTION_FAILED"


def test_a_model_whose_rows_look_at_each_other_is_not_batched() -> None:
    proven = show(lambda i: [i[0].sum(1) - i[0].mean()])
    assert (proven.joins, proven.splits) == (False, False)
    assert "over 4 batches" in repr(proven.latency)


def test_a_model_that_takes_only_its_samples_size_is_not_batched() -> None:
    def picky(inputs: Arrays) -> Any:
        assert len(inputs[0]) == len(ROWS)
        return sums(inputs)

    proven = show(picky)
    assert (proven.joins, proven.splits) == (False, False)


def test_a_model_that_numbers_its_rows_is_not_split_and_not_joined() -> None:
    proven = show(lambda i: [np.arange(len(i[0]), dtype=np.float32)])
    assert (proven.joins, proven.splits) == (False, False)


def test_a_model_that_writes_into_its_inputs_is_not_trusted_with_others() -> None:
    def rude(inputs: Arrays) -> Any:
        inputs[0][:] += 1
        return sums(inputs)

    assert not show(rude).joins


def test_fixed_shapes_are_never_joined() -> None:
    fixed = TensorSpec(name="x", dtype="float32", shape=(4, 2))
    proven = show(sums, x=fixed)
    assert (proven.joins, proven.splits) == (False, False)


def test_warming_stops_at_the_largest_batch() -> None:
    sizes: list[int] = []

    def watched(inputs: Arrays) -> Any:
        sizes.append(len(inputs[0]))
        return sums(inputs)

    show(watched, max_rows=20)
    assert max(sizes) == 16


def test_bfloat16_is_compared_as_numbers_not_as_bits() -> None:
    y = TensorSpec(name="y", dtype="bfloat16", shape=(-1,))

    def narrow(inputs: Arrays) -> list[Any]:
        return [inputs[0].sum(1).astype(ml_dtypes.bfloat16)]

    near = [3, 7, 11, 16.125]
    assert show(narrow, outputs=near, dtype=ml_dtypes.bfloat16, y=y, tolerance=0.02).joins
    assert refused(narrow, outputs=near, dtype=ml_dtypes.bfloat16, y=y, tolerance=0.001) == "SELF_TEST_FAILED"


def test_bytes_are_compared_exactly() -> None:
    y = TensorSpec(name="y", dtype="bytes", shape=(-1,))

    def texts(inputs: Arrays) -> list[Any]:
        return [np.array([str(int(total)).encode() for total in inputs[0].sum(1)], np.object_)]

    assert show(texts, outputs=[b"3", b"7", b"11", b"16"], dtype=np.object_, y=y).joins
    assert refused(texts, outputs=[b"3", b"7", b"11", b"17"], dtype=np.object_, y=y) == "SELF_TEST_FAILED"
