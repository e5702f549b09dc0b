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
from plait.errors import FailedPrecondition, ResourceExhausted
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, Execution, TensorSpec

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
    buckets: tuple[int, ...] = (),
    autocast: Any = "",
    others: Sequence[Callable[[Arrays], Any]] = (),
) -> Proven:
    manifest = ArtifactManifest(
        name="m",
        format="torchscript",
        entry="model.pt",
        inputs=(x,),
        outputs=(y,),
        batching=Batching(buckets=buckets),
        execution=Execution(autocast=autocast),
    )
    sample = Sample(inputs=(ROWS.copy(),), outputs=None if outputs is None else (np.array(outputs, dtype),), tolerance=tolerance)
    layout = Layout.of(manifest.signature, manifest.batching)
    return prove(model, layout, Artifact(manifest=manifest, folder=Path(), sample=sample), max_rows, others=others)


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


class Watched:
    """Sums of rows; notes how many rows each call had. `lanes`: places that calls in a row visit in turn."""

    def __init__(self, lanes: int = 1, wrong_from: int = 10**9, add: float = 0.0) -> None:
        self.lanes = lanes
        self.sizes: list[int] = []
        self.visited: list[set[int]] = [set() for _ in range(lanes)]
        self._wrong_from = wrong_from
        self._add = add

    def __call__(self, inputs: Arrays) -> list[Any]:
        rows = len(inputs[0])
        self.visited[len(self.sizes) % self.lanes].add(rows)
        self.sizes.append(rows)
        return [inputs[0].sum(1) + (rows >= self._wrong_from) + np.float32(self._add)]


def test_every_size_that_batches_are_padded_to_is_warm_wherever_a_model_computes() -> None:
    models = [Watched(lanes=7), Watched(lanes=2), Watched()]
    proven = show(models[0], max_rows=100, buckets=(2, 8, 64, 128), others=models[1:])
    assert (proven.joins, proven.splits) == (True, True)
    for model in models:
        assert all({2, 8, 64} <= visited for visited in model.visited)
        assert 128 not in model.sizes  # larger than a batch may be
        warmed = [size for size in model.sizes if size in (2, 8, 64)]
        assert warmed.index(64) < warmed.index(8)


def test_a_slow_model_is_warmed_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_worker.proof._WARM_LIMIT_S", 0.0)
    model = Watched(lanes=3)
    show(model, buckets=(16, 32))
    assert [model.sizes.count(size) for size in (16, 32)] == [3, 3]


def test_sizes_between_buckets_are_not_warmed_as_no_batch_has_them() -> None:
    model = Watched()
    show(model, max_rows=1024, buckets=(16, 32))
    assert set(model.sizes) == {4, 9, 2, 16, 32, 64, 256, 1024}  # the sample, joined and split; the buckets; what exceeds them


def test_padding_that_changes_an_answer_stops_padding_and_joining_alike() -> None:
    assert show(Watched(), buckets=(16,)).joins
    assert not show(Watched(wrong_from=16), buckets=(16,)).joins


def test_a_copy_that_answers_otherwise_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as failed:
        show(sums, outputs=[3, 7, 11, 16], others=[Watched(), Watched(add=1.0)])
    assert failed.value.reason == "SELF_TEST_FAILED"


def test_a_model_with_row_splits_is_warmed_with_one_request_more() -> None:
    seen: list[list[int]] = []

    def ranks(inputs: Arrays) -> list[Any]:
        user, item, splits = inputs
        seen.append(splits.tolist())
        assert len(user) == len(splits) - 1
        return [item.sum(1)]

    user = TensorSpec(name="u", dtype="float32", shape=(1, 3), per="request")
    manifest = ArtifactManifest(
        name="m", format="torchscript", entry="m", inputs=(user, X), outputs=(Y,), batching=Batching(row_splits="s", buckets=(8,))
    )
    sample = Sample(inputs=(np.ones((1, 3), np.float32), ROWS), outputs=None, tolerance=1e-4)
    layout = Layout.of(manifest.signature, manifest.batching)
    assert prove(ranks, layout, Artifact(manifest=manifest, folder=Path(), sample=sample), 64).joins
    assert seen.count([0, 4, 8]) == 4


@pytest.mark.parametrize(("autocast", "joins"), [("", False), ("bfloat16", True)])
def test_company_may_change_an_answer_by_what_the_narrow_type_cannot_tell(autocast: str, joins: bool) -> None:
    def rounds(inputs: Arrays) -> list[Any]:
        return [inputs[0].sum(1) * np.float32(1 + len(inputs[0]) * 1e-4)]

    assert show(rounds, autocast=autocast).joins is joins


def full_from(rows: int, sizes: list[int]) -> Callable[[Arrays], Any]:
    def model(inputs: Arrays) -> list[Any]:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) >= rows:
            raise ResourceExhausted("the device is full", reason="OUT_OF_DEVICE_MEMORY")
        return sums(inputs)

    return model


def test_warming_ends_where_the_devices_memory_does() -> None:
    sizes: list[int] = []
    assert show(full_from(64, sizes), max_rows=1024).joins
    assert sizes[-1] == 64


def test_buckets_that_do_not_fit_the_device_are_refused() -> None:
    assert refused(full_from(64, []), buckets=(8, 64)) == "OUT_OF_DEVICE_MEMORY"
    assert refused(full_from(3, [])) == "OUT_OF_DEVICE_MEMORY"
