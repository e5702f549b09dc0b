"""The committed manifests are what the features' names give, and fit together with a trained artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from marketplace import manifests, train
from marketplace.data import Dataset
from marketplace.features import Features, view_features
from plait.registry import crosschecks
from plait.registry.manifests import load, pin_artifacts
from plait.registry.records import FeatureSet, Model, Snapshot
from plait.registry.resources import snapshot_of
from plait.registry.yaml_tree import dump


@pytest.fixture(scope="module")
def records(data: Dataset, features: Features, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What `plait apply -f manifests` would apply, with an artifact made here."""
    folder = train.export(
        trained.model,
        data,
        features,
        tmp_path_factory.mktemp("run") / "artifact",
        name=manifests.MODEL,
        feature_set=manifests.FEATURE_SET,
    )
    placed = []
    for manifest in load([manifests.FOLDER]):
        record: Any = manifest.record
        if isinstance(record, Model):
            record = dataclasses.replace(record, versions=tuple(dataclasses.replace(v, artifact=str(folder)) for v in record.versions))
        placed.append(dataclasses.replace(manifest, record=record))
    return [manifest.record for manifest in pin_artifacts(placed)]


def test_the_committed_files_are_what_the_names_give(data: Dataset) -> None:
    made = manifests.documents(data, "../artifact")
    assert {path.name for path in manifests.FOLDER.iterdir()} == made.keys()
    for name, documents in made.items():
        assert (manifests.FOLDER / name).read_text(encoding="utf-8") == "---\n".join(dump(d) for d in documents), name


def test_they_fit_together(records: list[Any]) -> None:
    snapshot = snapshot_of(1, records, [])
    assert crosschecks.check(snapshot) == ()
    route = snapshot.routes[manifests.ROUTE]
    [variant] = route.variants
    model = snapshot.models[variant.model]
    version = model.resolve(variant.use)
    assert version is not None
    assert crosschecks.misfits(route, model, version, snapshot) == ()


def test_a_feature_less_would_be_found(records: list[Any]) -> None:
    def shorter(record: Any) -> Any:
        if not isinstance(record, FeatureSet) or record.name != manifests.FEATURE_SET:
            return record
        first, *others = record.inputs
        return dataclasses.replace(record, inputs=(dataclasses.replace(first, features=first.features[:-1]), *others))

    assert crosschecks.check(snapshot_of(1, map(shorter, records), []))


def test_the_set_lists_columns_as_the_model_was_trained_on_them(records: list[Any], data: Dataset) -> None:
    names = view_features(data)
    [feature_set] = [r for r in records if isinstance(r, FeatureSet) and r.name == manifests.FEATURE_SET]
    assert {i.name: i.features for i in feature_set.inputs} == {
        "user": tuple(f"{view}:{name}" for view in ("user-profile", "user-behaviour") for name in names[view]),
        "item": tuple(f"{view}:{name}" for view in ("item-content", "item-stats") for name in names[view]),
    }


def test_whoever_is_unknown_is_served(records: list[Any]) -> None:
    snapshot: Snapshot = snapshot_of(1, records, [])
    for view in snapshot.feature_views.values():
        assert all(feature.default is not None for feature in view.features), view.name
    defaults = {f.name: f.default for f in snapshot.feature_views["user-profile"].features}
    assert (defaults["age"], defaults["male"], defaults["occupation_artist"]) == (0.34, 0.7, 0.0)


def test_main_writes_them(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "FOLDER", tmp_path)
    monkeypatch.setattr(manifests.data_module, "load", lambda: data)
    manifests.main()
    assert [m.kind for m in load([tmp_path])] == ["FeatureView", "FeatureSet", "FeatureSet", *["FeatureView"] * 4, "Model", "Route"]
