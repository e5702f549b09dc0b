"""Joining requests and dividing answers: whatever the sizes, everybody gets exactly what is theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.ragged import Layout, Piece
from plait.errors import Internal
from plait.registry.records import Batching, Signature, TensorSpec

USER = TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request")
ITEM = TensorSpec(name="item", dtype="float32", shape=(-1, 3))
SCORE = TensorSpec(name="score", dtype="float32", shape=(-1,))
TOTAL = TensorSpec(name="total", dtype="float32", shape=(1,), per="request")
RANKER = Layout.of(Signature(inputs=(USER, ITEM), outputs=(SCORE, TOTAL)), Batching(row_splits="row_splits"))


def model(arguments: Any) -> list[np.ndarray[Any, Any]]:
    """score = user's first cell + item's first cell; total = sum of the request's scores."""
    user, item, splits = arguments
    rows = np.diff(splits)
    scores = np.repeat(user[:, 0], rows) + item[:, 0]
    return [scores, np.add.reduceat(scores, splits[:-1])]


def request(n: int, rows: int) -> tuple[np.ndarray[Any, Any], ...]:
    return np.full((1, 2), n * 1000, np.float32), np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=12))
def test_what_was_joined_is_divided_as_if_each_had_come_alone(sizes: list[tuple[int, int, int]]) -> None:
    pieces = []
    for n, (rows, start, length) in enumerate(sizes):
        begin = min(start, rows - 1)
        pieces.append(Piece(request(n, rows), begin, min(rows, begin + length)))
    together = RANKER.divide(model(RANKER.join(pieces)), pieces)
    assert len(together) == len(pieces)
    for piece, found in zip(pieces, together, strict=True):
        [alone] = RANKER.divide(model(RANKER.join([piece])), [piece])
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_array_equal(a, b)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_pieces_of_one_request_are_put_together_in_order(lengths: list[int]) -> None:
    rows = sum(lengths)
    ends = np.cumsum(lengths).tolist()
    pieces = [Piece(request(1, rows), end - length, end) for length, end in zip(lengths, ends, strict=True)]
    parts = [RANKER.divide(model(RANKER.join([piece])), [piece])[0] for piece in pieces]
    scores, _ = RANKER.rejoin(parts)
    [(expected, _)] = RANKER.divide(model(RANKER.join([Piece(request(1, rows), 0, rows)])), [Piece(request(1, rows), 0, rows)])
    np.testing.assert_array_equal(scores, expected)


def test_a_lone_request_is_passed_on_without_a_copy() -> None:
    user, item = request(1, 4)
    joined = RANKER.join([Piece((user, item), 0, 4)])
    assert joined[0] is user
    assert joined[1] is item
    assert joined[2].tolist() == [0, 4]
    assert np.shares_memory(RANKER.join([Piece((user, item), 1, 3)])[1], item)


def test_the_user_side_is_stacked_once_per_request_however_many_rows_it_has() -> None:
    user, item, splits = RANKER.join([Piece(request(1, 4), 0, 4), Piece(request(2, 2), 0, 2)])
    assert (user.shape, item.shape) == ((2, 2), (6, 3))
    assert (splits.tolist(), splits.dtype) == ([0, 4, 6], np.int64)


@pytest.mark.parametrize(
    ("outputs", "what"),
    [
        ([np.zeros(6)], "1 outputs instead of 2"),
        ([np.zeros(5), np.zeros(2)], "where 6 entries were due"),
        ([np.zeros(6), np.zeros(1)], "where 2 entries were due"),
        ([np.zeros(()), np.zeros(2)], "where 6 entries were due"),
    ],
)
def test_answers_that_do_not_add_up_are_refused(outputs: Any, what: str) -> None:
    with pytest.raises(Internal, match=what) as wrong:
        RANKER.divide(outputs, [Piece(request(1, 4), 0, 4), Piece(request(2, 2), 0, 2)])
    assert wrong.value.reason == "MODEL_OUTPUT_WRONG"


@pytest.mark.parametrize(
    ("inputs", "outputs", "growing"),
    [
        ((ITEM,), (SCORE,), True),
        ((USER, ITEM), (SCORE, TOTAL), True),
        ((TensorSpec(name="x", dtype="float32", shape=(8, 3)),), (SCORE,), False),
        ((ITEM,), (TensorSpec(name="y", dtype="float32", shape=(8,)),), False),
        ((TensorSpec(name="u", dtype="float32", shape=(2, 3), per="request"), ITEM), (SCORE,), False),
    ],
)
def test_only_shapes_that_can_grow_are_joined(inputs: Any, outputs: Any, growing: bool) -> None:
    assert Layout.of(Signature(inputs=inputs, outputs=outputs), Batching()).growing is growing


def test_fixed_shapes_are_passed_through_untouched() -> None:
    fixed = TensorSpec(name="x", dtype="float32", shape=(8, 3))
    layout = Layout.of(Signature(inputs=(fixed,), outputs=(fixed,)), Batching())
    x = np.zeros((8, 3), np.float32)
    [(found,)] = layout.divide([x], [Piece((x,), 0, 8)])
    assert found is x


def test_requests_share_a_batch_only_where_all_but_the_first_dimension_agrees() -> None:
    assert RANKER.kind(request(1, 4)) == RANKER.kind(request(2, 9))
    assert RANKER.kind(request(1, 4)) != RANKER.kind((np.zeros((1, 2)), np.zeros((4, 5))))
