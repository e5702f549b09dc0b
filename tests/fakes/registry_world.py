"""A small registry in which everything fits together, and ways to bend one part of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from plait.registry.manifests import Manifest
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Record,
    Route,
    Signature,
    Tenant,
    TensorSpec,
    Variant,
)

DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64

USERS = FeatureView(name="user-profile", entity=Entity(type="user"), features=(Feature(name="age", default=30), Feature(name="active")))
ITEMS = FeatureView(name="item-stats", entity=Entity(type="item"), features=(Feature(name="price"), Feature(name="views", dtype="int64")))
FEATURES = FeatureSet(
    name="home",
    inputs=(
        ModelInput(name="user", entity="user", features=("user-profile:age", "user-profile:active")),
        ModelInput(name="item", entity="item", features=("item-stats:price", "item-stats:views")),
    ),
)
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, 2)),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    feature_set="home",
)
VERSION = ModelVersion(version="1", artifact="/models/ranker/1", digest=DIGEST, signature=SIGNATURE, metrics={"auc": 0.75})
RANKER = Model(name="ranker", versions=(VERSION,), aliases={"champion": "1"})
HOME = Route(name="home", variants=(Variant(name="main", model="ranker", use="champion"),), tenants=("shop",))
SHOP = Tenant(name="shop")

WORLD: tuple[Record, ...] = (USERS, ITEMS, FEATURES, RANKER, HOME, SHOP)


def manifests(*records: Record) -> list[Manifest]:
    """Return manifests of the records, as if made in code; of the whole world when none is given."""
    return [Manifest(record=record) for record in records or WORLD]


async def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Return as soon as the condition holds; fail with what it is when it does not in time."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"did not happen within {timeout_s} s"
        await asyncio.sleep(0.005)
