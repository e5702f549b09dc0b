"""Training on the earlier part of time, judging on the later: measures by hand, negatives that are fair, no look ahead."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marketplace import features as features_module
from marketplace import train
from marketplace.data import Dataset
from marketplace.features import LIKED, Features
from plait.registry import artifact


def table(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


def users(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (table([3, 1, 2]), 1.0),
        (table([0, 1, 2]), 0.0),
        (table([2, 1, 3]), 0.5),
        (table([1, 1, 1]), 0.5),  # ties count half
        (table([1, 1, 0]), 0.75),
        (table([3, 1, 2], [0, 1, 2], [2, 1, 3], [2, 2, 3]), (2 + 0 + 1 + 0.5) / 8),
    ],
)
def test_auc_by_hand(scores: Any, expected: float) -> None:
    assert train.auc(scores) == pytest.approx(expected)


_LOG3, _LOG4 = 1 / math.log2(3), 1 / math.log2(4)


@pytest.mark.parametrize(
    ("scores", "who", "k", "expected"),
    [
        (table([9, 1, 2, 3]), users(5), 10, 1.0),
        (table([2, 1, 3, 0]), users(5), 10, _LOG3),
        (table([2, 4, 3, 0]), users(5), 10, _LOG4),
        (table([2, 4, 3, 0]), users(5), 2, 0.0),  # third of the first two
        (table([2, 4, 1, 0]), users(5), 2, _LOG3),
        (table([1, 1, 0, 0]), users(5), 10, _LOG3),  # ties rank worst
        (table([9, 1, 2], [9, 1, 2], [1, 2, 0]), users(4, 4, 7), 10, (1 + _LOG3) / 2),  # per user, then over users
        (table([9, 1, 2], [1, 2, 0], [9, 1, 2]), users(4, 4, 7), 10, ((1 + _LOG3) / 2 + 1) / 2),
    ],
)
def test_ndcg_by_hand(scores: Any, who: Any, k: int, expected: float) -> None:
    assert train.ndcg(scores, who, k) == pytest.approx(expected)


def test_negatives_are_items_that_were_there_and_that_the_user_never_rated(data: Dataset) -> None:
    seen = train._seen(data)
    events = np.flatnonzero(data.rating >= LIKED)[15:]  # the first of them while most items have not been seen
    drawn = train.sample(data, seen, events, 20, np.random.default_rng(1))
    assert drawn.shape == (len(events), 21)
    assert (drawn[:, 0] == data.event_item[events]).all()
    assert not seen[data.event_user[events][:, None], drawn[:, 1:]].any()
    first = np.full(len(data.item_ids), len(data.rating))
    np.minimum.at(first, data.event_item, np.arange(len(data.rating)))
    assert np.sort(first)[60] > events[0]
    assert (first[drawn] <= events[:, None]).all()
    assert len(np.unique(drawn[:, 1:])) > len(data.item_ids) / 2
    again = train.sample(data, seen, events, 20, np.random.default_rng(1))
    np.testing.assert_array_equal(drawn, again)


def test_a_score_sees_nothing_of_its_event_or_later(data: Dataset, features: Features, trained: Any) -> None:
    event = 1_500
    other = dataclasses.replace(data, rating=data.rating.copy(), event_item=data.event_item.copy())
    other.rating[event:] = 6 - other.rating[event:]
    other.event_item[event + 1 :] = other.event_item[event + 1 :][::-1]
    candidates = np.arange(30)[None]
    with torch.inference_mode():
        before, after = (
            train.score(trained.model, d, f, np.array([event]), candidates)
            for d, f in ((data, features), (other, features_module.compute(other)))
        )
        later = train.score(trained.model, data, features, np.array([event + 400]), candidates)
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, later)


def test_what_is_trained_beats_popularity_on_the_later_part(data: Dataset, features: Features, trained: Any) -> None:
    report = train.judge(trained.model, data, features, train_s=1.5)
    assert report.auc > max(0.6, report.baseline_auc + 0.05)
    assert report.ndcg10 > report.baseline_ndcg10
    split = int(len(data.rating) * train.TRAIN_SHARE)
    later = data.rating[split:] >= LIKED
    assert (report.likes_judged, report.train_s) == (int(later.sum()), 1.5)
    assert report.users_judged == len(set(data.event_user[split:][later].tolist()))
    assert report.likes_trained == int((data.rating[int(split * train.WARM_UP_SHARE) : split] >= LIKED).sum())
    assert trained.progress == sorted(trained.progress)
    assert trained.progress[-1] == 1.0


def test_training_is_deterministic_and_ignores_the_later_part(data: Dataset, features: Features, trained: Any) -> None:
    """The later ratings are turned around; who rated what stays, because negatives are never items a user rated."""
    split = int(len(data.rating) * train.TRAIN_SHARE)
    other = dataclasses.replace(data, rating=data.rating.copy())
    other.rating[split:] = 6 - other.rating[split:]
    again = train.train(other, features_module.compute(other))
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_the_artifact_is_whole_and_scores_as_the_model(data: Dataset, features: Features, trained: Any, tmp_path: Path) -> None:
    folder = train.export(trained.model, data, features, tmp_path / "artifact", name="ranker", feature_set="home")
    manifest = artifact.read(folder)
    artifact.verify_files(folder, manifest)
    assert (manifest.name, manifest.format, manifest.entry, manifest.feature_set) == ("ranker", "torchscript", "model.pt", "home")
    assert [(t.name, t.per, t.shape) for t in manifest.inputs] == [
        ("user", "request", (1, features.user_profile.shape[1] + features.user_behaviour.rows.shape[1])),
        ("item", "row", (-1, features.item_content.shape[1] + features.item_stats.rows.shape[1])),
    ]
    assert manifest.batching.row_splits == "row_splits"

    scripted = torch.jit.load(str(folder / "model.pt")).eval()  # type: ignore[no-untyped-call]
    saved = np.load(folder / "self_test.npz", allow_pickle=False)
    user, item = (torch.from_numpy(saved[f"input.{name}"]) for name in ("user", "item"))
    with torch.inference_mode():
        scores = scripted(user, item, torch.tensor([0, len(item)]))
        torch.testing.assert_close(scores, torch.from_numpy(saved["output.score"]))
        torch.testing.assert_close(scores, trained.model(user, item, torch.tensor([0, len(item)])))
        users_, items_ = torch.cat([user, user + 1]), torch.cat([item, item])
        both = scripted(users_, items_, torch.tensor([0, len(item), 2 * len(item)]))  # the other branch
    torch.testing.assert_close(both[: len(item)], scores, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[len(item) :], scores)
