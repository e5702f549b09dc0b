"""Train the ranker on the earlier part of time, judge it on the later part against popularity, export it as an artifact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from marketplace.data import Dataset
from marketplace.features import LIKED, Array, Features, Index
from marketplace.model import Ranker
from plait.registry.artifact import ArtifactManifest, SelfTest, write
from plait.registry.records import Batching, TensorSpec

TRAIN_SHARE: Final = 0.8  # of the events, in time order
WARM_UP_SHARE: Final = 0.1  # events too early to learn from: the statistics are still empty
NEGATIVES: Final = 15  # per like, while training
EVALUATED: Final = 100  # other items each like is ranked among, while judging
MAX_EVALUATED_EVENTS: Final = 4_000
EPOCHS: Final = 4
BATCH: Final = 256  # likes
SEED: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured: on likes of the later part of time, each ranked among EVALUATED items its user never rated.

    `auc`: chance that the liked item scores above another; `ndcg10`: mean over users of NDCG@10. The baseline orders by how many events an
    item had had by then.
    """

    auc: float
    ndcg10: float
    baseline_auc: float
    baseline_ndcg10: float
    train_s: float
    likes_trained: int
    likes_judged: int
    users_judged: int


def train(data: Dataset, features: Features, progress: Callable[[float], None] = lambda _: None) -> Ranker:
    """Return a ranker fitted with a softmax over each like and its sampled negatives; deterministic for a machine and thread count."""
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    split = int(len(data.rating) * TRAIN_SHARE)
    likes = np.flatnonzero(data.rating[:split] >= LIKED)
    likes = likes[likes >= int(split * WARM_UP_SHARE)]
    seen = _seen(data)
    model = Ranker(
        features.user_profile.shape[1] + features.user_behaviour.rows.shape[1],
        features.item_content.shape[1] + features.item_stats.rows.shape[1],
    )
    model.standardise(*_inputs(data, features, likes, sample(data, seen, likes, 1, generator)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = EPOCHS * -(-len(likes) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    loss = nn.CrossEntropyLoss()
    step = 0
    for _ in range(EPOCHS):
        shuffled = generator.permutation(likes)
        for start in range(0, len(shuffled), BATCH):
            events = shuffled[start : start + BATCH]
            scores = score(model, data, features, events, sample(data, seen, events, NEGATIVES, generator))
            optimiser.zero_grad()
            loss(scores, torch.zeros(len(events), dtype=torch.long)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            step += 1
            progress(step / steps)
    return model.eval()


def judge(model: Ranker, data: Dataset, features: Features, train_s: float) -> Report:
    """Measure a ranker and the popularity baseline on the same likes and the same other items."""
    generator = np.random.default_rng(SEED + 1)
    split = int(len(data.rating) * TRAIN_SHARE)
    likes = np.flatnonzero(data.rating[split:] >= LIKED) + split
    if len(likes) > MAX_EVALUATED_EVENTS:
        likes = np.sort(generator.choice(likes, MAX_EVALUATED_EVENTS, replace=False))
    candidates = sample(data, _seen(data), likes, EVALUATED, generator)
    scores, popularity = [], []
    for start in range(0, len(likes), BATCH):
        part = slice(start, start + BATCH)
        with torch.inference_mode():
            scores.append(score(model, data, features, likes[part], candidates[part]).numpy())
        rows = features.item_stats.before(candidates[part].ravel(), np.repeat(likes[part], EVALUATED + 1))
        popularity.append(features.item_stats.rows[rows, 0].reshape(-1, EVALUATED + 1))
    ours, theirs = np.concatenate(scores), np.concatenate(popularity)
    users = data.event_user[likes]
    warm = int(split * WARM_UP_SHARE)
    return Report(
        auc=auc(ours),
        ndcg10=ndcg(ours, users, 10),
        baseline_auc=auc(theirs),
        baseline_ndcg10=ndcg(theirs, users, 10),
        train_s=train_s,
        likes_trained=int((data.rating[warm:split] >= LIKED).sum()),
        likes_judged=len(likes),
        users_judged=len(np.unique(users)),
    )


def sample(data: Dataset, seen: npt.NDArray[np.bool_], events: Index, count: int, generator: np.random.Generator) -> Index:
    """Return [events, 1 + count] items: the event's own, then items that existed by then and that its user never rated, at random."""
    first = np.full(len(data.item_ids), len(data.rating))
    np.minimum.at(first, data.event_item, np.arange(len(data.rating)))
    by_age = np.argsort(first, kind="stable")
    known = np.searchsorted(first[by_age], events)  # how many items had had an event before this one
    users = data.event_user[events][:, None]
    drawn = np.empty((len(events), count), np.int64)
    redo = np.ones_like(drawn, np.bool_)
    for _ in range(100):
        fresh = by_age[(generator.random(drawn.shape) * np.maximum(known, 1)[:, None]).astype(np.int64)]
        drawn[redo] = fresh[redo]
        redo = seen[users, drawn]
        if not redo.any():
            break
    return np.concatenate([data.event_item[events][:, None], drawn], axis=1)


def score(model: Ranker, data: Dataset, features: Features, events: Index, candidates: Index) -> torch.Tensor:
    """Return [events, candidates] scores with features as of just before each event."""
    user, item = _inputs(data, features, events, candidates)
    per_event = candidates.shape[1]
    splits = torch.arange(0, (len(events) + 1) * per_event, per_event)
    scores: torch.Tensor = model(user, item, splits)
    return scores.reshape(len(events), per_event)


def auc(scores: Array) -> float:
    """Return the chance that column 0 (the liked item) scores above another column; ties count half.

    The area under the ROC curve in its Mann-Whitney form.
    """
    own, others = scores[:, :1], scores[:, 1:]
    return float((others < own).mean() + (others == own).mean() / 2)


def ndcg(scores: Array, users: Index, k: int) -> float:
    """Return NDCG@k of rankings with one relevant item (column 0), averaged per user and then over users; ties rank worst.

    Järvelin & Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 20(4), 2002.
    """
    rank = (scores[:, 1:] >= scores[:, :1]).sum(axis=1) + 1
    gains = np.where(rank <= k, 1 / np.log2(rank + 1.0), 0.0)
    _, groups = np.unique(users, return_inverse=True)
    return float((np.bincount(groups, gains) / np.bincount(groups)).mean())


def script(model: Ranker) -> torch.jit.ScriptModule:
    """Return the model as TorchScript, which keeps the branch for a lone request."""
    with warnings.catch_warnings():
        # torch prefers torch.export, which traces one branch only; plait serves both formats.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
    return scripted


def export(model: Ranker, data: Dataset, features: Features, folder: Path, *, name: str, feature_set: str) -> Path:
    """Write the artifact (model.pt, self_test.npz, model.yaml with digests) into `folder` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    scripted = script(model)
    scripted.save(str(folder / "model.pt"))
    items = np.arange(min(8, len(data.item_ids)))
    user = features.user(np.array([0]), features.user_behaviour.latest(np.array([0])))
    item = features.item(items, features.item_stats.latest(items))
    with torch.inference_mode():
        expected = scripted(torch.from_numpy(user), torch.from_numpy(item), torch.tensor([0, len(items)])).numpy()
    np.savez(folder / "self_test.npz", **{"input.user": user, "input.item": item, "output.score": expected})
    manifest = ArtifactManifest(
        name=name,
        format="torchscript",
        entry="model.pt",
        feature_set=feature_set,
        inputs=(
            TensorSpec(name="user", dtype="float32", shape=(1, user.shape[1]), per="request"),
            TensorSpec(name="item", dtype="float32", shape=(-1, item.shape[1]), per="row"),
        ),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
        batching=Batching(row_splits="row_splits"),
        self_test=SelfTest(file="self_test.npz", tolerance=1e-4),
    )
    write(folder, manifest)
    return folder


def _seen(data: Dataset) -> npt.NDArray[np.bool_]:
    seen = np.zeros((len(data.user_ids), len(data.item_ids)), np.bool_)
    seen[data.event_user, data.event_item] = True
    return seen


def _inputs(data: Dataset, features: Features, events: Index, candidates: Index) -> tuple[torch.Tensor, torch.Tensor]:
    users = data.event_user[events]
    user = features.user(users, features.user_behaviour.before(users, events))
    flat = candidates.ravel()
    item = features.item(flat, features.item_stats.before(flat, np.repeat(events, candidates.shape[1])))
    return torch.from_numpy(user), torch.from_numpy(item)
