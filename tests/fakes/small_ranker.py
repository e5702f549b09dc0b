"""A ranker of a few numbers, published as a real artifact, with the features, manifests and offline scores that go with it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest, SelfTest
from plait.registry.manifests import Manifest
from plait.registry.records import (
    Batching,
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Route,
    TensorSpec,
    Variant,
)

USERS = FeatureView(
    name="user-profile", entity=Entity(type="user"), features=(Feature(name="age", default=30), Feature(name="active", default=0))
)
ITEMS = FeatureView(
    name="item-stats",
    entity=Entity(type="item"),
    features=(Feature(name="price", default=1), Feature(name="views", default=0), Feature(name="sold", default=0)),
)
FEATURES = FeatureSet(
    name="home",
    inputs=(
        ModelInput(name="user", entity="user", features=("user-profile:age", "user-profile:active")),
        ModelInput(name="item", entity="item", features=("item-stats:price", "item-stats:views", "item-stats:sold")),
    ),
)


class SmallRanker(nn.Module):
    """Two towers of one layer each; `row_splits` says which rows are whose."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.user = nn.Linear(2, 4)
        self.item = nn.Linear(3, 4)
        self.top = nn.Linear(4, 1)

    def forward(self, user: Tensor, item: Tensor, row_splits: Tensor) -> Tensor:
        users = self.user(user).repeat_interleave(row_splits[1:] - row_splits[:-1], dim=0)
        scores: Tensor = self.top(torch.tanh(users + self.item(item))).squeeze(1)
        return scores


def publish(folder: Path, *, seed: int = 0, item_width: int = 3) -> Path:
    """Write the artifact into `folder` and return it. With an `item_width` other than 3 it only claims to take what it does not."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(SmallRanker(seed))
        model.save(str(folder / "model.pt"))
    user, item = np.array([[30, 1]], np.float32), np.arange(12, dtype=np.float32).reshape(4, 3)
    with torch.inference_mode():
        expected = model(torch.from_numpy(user), torch.from_numpy(item), torch.tensor([0, 4])).numpy()
    np.savez(folder / "self_test.npz", **{"input.user": user, "input.item": item, "output.score": expected})
    manifest = ArtifactManifest(
        name="ranker",
        format="torchscript",
        entry="model.pt",
        feature_set="home",
        inputs=(
            TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request"),
            TensorSpec(name="item", dtype="float32", shape=(-1, item_width), per="row"),
        ),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
        batching=Batching(row_splits="row_splits"),
        self_test=SelfTest(file="self_test.npz"),
    )
    artifact.write(folder, manifest)
    return folder


def model(name: str, *versions: Path) -> Model:
    """Return a Model record with versions "1", "2", … of which the last is the champion."""
    found = tuple(ModelVersion(version=str(n), artifact=str(folder)) for n, folder in enumerate(versions, 1))
    return Model(name=name, versions=found, aliases={"champion": str(len(found))})


def route(name: str, model_name: str = "ranker", **more: Any) -> Route:
    """Return a Route with one variant that uses the model's champion."""
    return Route(name=name, variants=(Variant(name="main", model=model_name, use="champion"),), **more)


def manifests(*records: Any) -> list[Manifest]:
    """Return them as if read from a file."""
    return [Manifest(record=record) for record in records]


def offline_scores(folder: Path, user: Sequence[float], items: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """Return the scores [items] of the artifact in `folder`, computed in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded: Any = torch.jit.load(str(folder / "model.pt")).eval()
    with torch.inference_mode():
        splits = torch.tensor([0, len(items)])
        scores: np.ndarray[Any, Any] = loaded(torch.tensor([user]), torch.tensor(items), splits).numpy()
    return scores
