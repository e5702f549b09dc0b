"""Padding leaves every answer what it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.backends import buckets
from model_worker.ragged import Layout

ROWS = Layout(row_inputs=(True,), row_outputs=(True,), row_splits=False, growing=True)
BOTH = Layout(row_inputs=(False, True), row_outputs=(True, False), row_splits=True, growing=True)


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, 4), (4, 4), (5, 16), (16, 16), (17, 17)])
def test_the_smallest_bucket_that_holds_the_rows(rows: int, expected: int) -> None:
    assert buckets.choose((4, 16), rows) == expected


def test_without_buckets_nothing_is_padded() -> None:
    assert buckets.choose((), 7) == 7


def test_the_last_row_is_repeated() -> None:
    [padded] = buckets.pad((np.array([[1], [2]]),), ROWS, 2, 4)
    assert padded.tolist() == [[1], [2], [2], [2]]


def test_a_full_batch_is_passed_on_untouched() -> None:
    array = np.zeros((4, 2))
    assert buckets.pad((array,), ROWS, 4, 4)[0] is array


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 9))
def test_pooling_over_requests_is_undisturbed(lengths: list[int], more: int) -> None:
    lengths[-1] += 1
    rows = sum(lengths)
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    users, items = np.arange(len(lengths)) * 10.0, np.arange(rows) + 1.0

    def model(users: np.ndarray, items: np.ndarray, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.array([items[a:b].sum() for a, b in itertools.pairwise(splits)])
        return items + np.repeat(users, np.diff(splits)), users + sums

    padded = buckets.pad((users, items, splits), BOTH, rows, rows + more)
    assert padded[2].dtype == np.int64
    assert padded[2][-1] == len(padded[1]) == rows + more
    found = buckets.cut(model(*padded), BOTH, rows, len(lengths))
    for got, expected in zip(found, model(users, items, splits), strict=True):
        np.testing.assert_array_equal(got, expected)
