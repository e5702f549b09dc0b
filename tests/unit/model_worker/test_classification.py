"""The highest values of each row, by index and name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.worker_world import SCORE, USER, published

from model_worker import artifacts, classification
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching


def texts(answer: Any) -> Any:
    return np.vectorize(bytes.decode)(answer).tolist()


def test_each_row_has_its_own_highest_with_index_and_label() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [5, 4, 3]], np.float32)
    assert texts(classification.top(scores, 2, by_row=True, labels=("cat", "dog"))) == [
        ["0.700000:1:dog", "0.200000:2"],
        ["5.000000:0:cat", "4.000000:1:dog"],
    ]
    assert texts(classification.top(scores, 2, by_row=False)) == ["5.000000:3", "4.000000:4"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.uint64, np.int64])
def test_every_number_type_is_ranked(dtype: Any) -> None:
    assert [t.split(":")[1] for t in texts(classification.top(np.array([1, 3, 2], dtype), 3, by_row=False))] == ["1", "2", "0"]


def test_the_extremes_of_integers_are_ranked_right() -> None:
    array = np.array([-(2**63), 2**63 - 1, 0, 2**63 - 2], np.int64)
    assert texts(classification.top(array, 9, by_row=False)) == [f"{2**63 - 1}:1", f"{2**63 - 2}:3", "0:2", f"{-(2**63)}:0"]


def test_what_is_no_number_comes_last() -> None:
    array = np.array([np.nan, 1, -1, np.inf], np.float32)
    assert texts(classification.top(array, 4, by_row=False)) == ["inf:3", "1.000000:1", "-1.000000:2", "nan:0"]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 6))
def test_it_is_what_sorting_each_row_gives(rows: list[list[int]], count: int) -> None:
    found = texts(classification.top(np.array(rows, np.int32), count, by_row=True))
    assert found == [[f"{row[i]}:{i}" for i in sorted(range(4), key=lambda i: (-row[i], i))[:count]] for row in rows]


def artifact_with(folder: Path, content: bytes, **labels: str) -> Any:
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    (folder / "labels.txt").write_bytes(content)
    manifest = ArtifactManifest(
        name="m", format="torchscript", entry="model.pt", inputs=(USER,), outputs=(SCORE,), labels=labels, batching=Batching(row_splits="s")
    )
    return artifacts.fetch(published(folder, manifest), None)


def test_labels_are_read_one_a_line(tmp_path: Path) -> None:
    assert classification.load_labels(artifact_with(tmp_path / "m", "Hündin\ncat\n".encode(), score="labels.txt")) == {
        "score": ("Hündin", "cat")
    }


@pytest.mark.parametrize(
    ("content", "labels", "reason"),
    [
        (b"a", {"nothing": "labels.txt"}, "ARTIFACT_INVALID"),
        (b"a", {"score": "missing.txt"}, "ARTIFACT_INVALID"),
        (b"\xff", {"score": "labels.txt"}, "LABELS_UNUSABLE"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, content: bytes, labels: Any, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        classification.load_labels(artifact_with(tmp_path / "m", content, **labels))
    assert refused.value.reason == reason
