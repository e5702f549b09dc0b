"""The ranker: a user tower run once per request gives what scoring every row alone gives."""

from __future__ import annotations

import pytest
import torch

from marketplace.model import CROSS, Ranker

USER, ITEM = 5, 7


@pytest.fixture
def model() -> Ranker:
    torch.manual_seed(0)
    model = Ranker(USER, ITEM, hidden=16, top=8)
    model.standardise(torch.randn(50, USER) * 3 + 1, torch.randn(60, ITEM) - 2)
    return model.eval()


def splits(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def plain(model: Ranker, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
    """The definition, for one user and one item: one layer over [user, item], and a product of projections, then the MLP."""
    user, item = (user - model.user_mean) * model.user_scale, (item - model.item_mean) * model.item_scale
    left, right = model.user_tower(user), model.item_tower(item)
    hidden = torch.relu(left[:-CROSS] + right[:-CROSS])
    score: torch.Tensor = model.mlp(torch.cat([hidden, left[-CROSS:] * right[-CROSS:]]))[0]
    return score


@pytest.mark.parametrize("counts", [(4,), (1,), (3, 1, 5), (2, 0, 3), (1, 1)])
def test_a_batch_scores_every_row_for_its_own_user(model: Ranker, counts: tuple[int, ...]) -> None:
    user, item = torch.randn(len(counts), USER), torch.randn(sum(counts), ITEM)
    with torch.inference_mode():
        scores = model(user, item, splits(*counts))
        owner = [at for at, count in enumerate(counts) for _ in range(count)]
        expected = torch.stack([plain(model, user[o], item[at]) for at, o in enumerate(owner)])
    assert scores.shape == (sum(counts),)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_no_rows_are_no_scores(model: Ranker) -> None:
    with torch.inference_mode():
        assert model(torch.randn(1, USER), torch.empty(0, ITEM), splits(0)).shape == (0,)


def test_scales_are_part_of_the_model(model: Ranker) -> None:
    copy = Ranker(USER, ITEM, hidden=16, top=8)
    copy.load_state_dict(model.state_dict())
    user, item = torch.randn(1, USER), torch.randn(3, ITEM)
    with torch.inference_mode():
        assert torch.equal(copy.eval()(user, item, splits(3)), model(user, item, splits(3)))


def test_a_feature_that_never_varies_is_not_blown_up() -> None:
    model = Ranker(USER, ITEM)
    model.standardise(torch.ones(10, USER), torch.ones(10, ITEM))
    assert model.user_scale.tolist() == pytest.approx([20] * USER)
    assert model.item_mean.tolist() == [1] * ITEM
