"""How a view's epochs move, as a state machine: whatever was done, the numbers make sense and are never given twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import FailedPrecondition
from plait.registry import epochs as rules
from plait.registry.records import Epochs

Move = Callable[[Epochs], Epochs]
MOVES: tuple[Move, ...] = (
    rules.begin,
    lambda epochs: rules.complete(epochs, epochs.newest),
    rules.flip,
    rules.rollback,
    rules.retire,
    rules.abandon,
)


def test_a_backfill_from_begin_to_retire() -> None:
    built = rules.begin(Epochs())
    assert built == Epochs(serving=0, building=1, newest=1)
    assert built.in_use == (0, 1)
    flipped = rules.flip(built)
    assert flipped == Epochs(serving=1, previous=0, newest=1)
    assert rules.rollback(flipped) == Epochs(serving=0, previous=1, newest=1)
    assert rules.retire(flipped) == Epochs(serving=1, newest=1)


def test_a_second_build_flips_over_the_first() -> None:
    flipped = rules.flip(rules.begin(rules.flip(rules.begin(Epochs()))))
    assert flipped == Epochs(serving=2, previous=1, newest=2)


@pytest.mark.parametrize(
    ("move", "epochs", "reason"),
    [
        (rules.begin, Epochs(building=1, newest=1), "EPOCH_BUSY"),
        (rules.flip, Epochs(), "EPOCH_NOT_FOUND"),
        (rules.rollback, Epochs(), "EPOCH_NOT_FOUND"),
        (rules.retire, Epochs(building=1, newest=1), "EPOCH_NOT_FOUND"),
        (rules.abandon, Epochs(), "EPOCH_NOT_FOUND"),
        (lambda epochs: rules.flip(epochs, 1), Epochs(building=2, newest=2), "EPOCH_NOT_FOUND"),  # 1 was given up, 2 is half built
        (lambda epochs: rules.complete(epochs, 1), Epochs(building=2, newest=2), "EPOCH_NOT_FOUND"),
        (lambda epochs: rules.complete(epochs, 1), Epochs(serving=1, newest=1), "EPOCH_NOT_FOUND"),
    ],
)
def test_moves_that_make_no_sense_are_refused(move: Move, epochs: Epochs, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        move(epochs)
    assert caught.value.reason == reason


@pytest.mark.parametrize("move", [rules.flip, rules.abandon])
def test_only_what_is_being_built_is_complete(move: Move) -> None:
    complete = rules.complete(rules.begin(Epochs()), 1)
    assert complete == Epochs(building=1, newest=1, built=True)
    assert not move(complete).built
    assert not rules.begin(move(complete)).built


@given(st.lists(st.sampled_from(MOVES), max_size=30))
def test_numbers_are_never_given_twice_and_never_shared(moves: list[Move]) -> None:
    epochs, begun = Epochs(), [0]
    for move in moves:
        try:
            after = move(epochs)
        except FailedPrecondition:
            continue
        if move is rules.begin:
            assert after.building is not None
            assert after.building > max(begun)
            begun.append(after.building)
        assert len(set(after.in_use)) == len(after.in_use)
        assert set(after.in_use) <= set(begun)
        assert after.newest == max(begun)
        epochs = after
