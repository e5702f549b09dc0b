"""The example's manifests: written once from the features' names by `python -m marketplace.manifests`, committed, and checked by a test.

The Model manifest names no digest: `plait apply` reads it from the artifact and pins it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from marketplace import data as data_module
from marketplace.features import GLOBAL_MEAN, HALF_LIFE_S, view_features
from plait.registry.yaml_tree import dump

FOLDER: Final = Path(__file__).parent.parent / "manifests"
MODEL: Final = "marketplace-ranker"
FEATURE_SET: Final = "marketplace-ranker"
ROUTE: Final = "home-feed"
ACTIVITY: Final = "item-activity"  # a view that is computed from the events alone, and a set to read it by
ACTIVITY_LATENESS_S: Final = 300 * 86_400.0  # the data spans seven months, and is replayed at once

_DAY_S: Final = 86_400.0

_ABOUT: Final = {
    "user-profile": ("user", "What a user told us."),
    "user-behaviour": ("user", "What a user did so far: running counts, means and tastes by genre."),
    "item-content": ("item", "What a listing is."),
    "item-stats": ("item", "What users did with a listing so far: running counts and means, whole and by segment."),
}
# For whoever is not known: the middle of the population. Every running feature of an entity without events is zero.
_DEFAULTS: Final = {"age": 0.34, "male": 0.7}


def documents(data: data_module.Dataset, artifact: str) -> dict[str, list[dict[str, Any]]]:
    """Return the manifests by file name."""
    views = view_features(data)
    inputs = []
    for entity in ("user", "item"):
        names = [f"{view}:{name}" for view, (owner, _) in _ABOUT.items() if owner == entity for name in views[view]]
        inputs.append({"name": entity, "entity": entity, "features": names})
    return {
        "feature-views.yaml": [_view(name, views[name]) for name in _ABOUT],
        "feature-set.yaml": [
            _manifest("FeatureSet", FEATURE_SET, {"description": "What the ranker sees of a user and of each listing.", "inputs": inputs})
        ],
        "activity.yaml": _activity(),
        "model.yaml": [
            _manifest(
                "Model",
                MODEL,
                {
                    "description": "Two-sided ranker trained on MovieLens-100K.",
                    "versions": [{"version": "1", "artifact": artifact}],
                    "aliases": {"champion": "1"},
                },
            )
        ],
        "route.yaml": [
            _manifest(
                "Route",
                ROUTE,
                {
                    "description": "Which listings a user sees first.",
                    "subject": "user",
                    "candidate": "item",
                    "variants": [{"name": "champion", "model": MODEL, "use": "champion", "weight": 1}],
                    "ladder": [{"tier": "popularity", "feature": "item-stats:log_recent"}],
                    "timeout_s": 1.0,
                },
            )
        ],
    }


def _activity() -> list[dict[str, Any]]:
    features = [
        ("ratings", 0.0, {"function": "count", "events": ["rate"]}),
        ("rating", GLOBAL_MEAN, {"function": "mean", "events": ["rate"], "value": "value"}),
        ("recent", 0.0, {"function": "count", "events": ["rate"], "half_life_s": HALF_LIFE_S}),
        ("last_rating", 0.0, {"function": "last", "events": ["rate"], "value": "value"}),
        (
            "raters_7d",
            0.0,
            {"function": "distinct", "events": ["rate"], "value": "subject", "window_s": 7 * _DAY_S, "tile_s": _DAY_S, "precision": 8},
        ),
    ]
    columns = [{"name": name, "dtype": "float32", "default": default, "aggregate": how} for name, default, how in features]
    return [
        _manifest(
            "FeatureView",
            ACTIVITY,
            {
                "description": "What users do with a listing, counted by feature-retrieval from the events themselves.",
                "entity": {"type": "item", "key": "string"},
                "aggregation": {"entity_from": "object", "lateness_s": ACTIVITY_LATENESS_S},
                "features": columns,
            },
        ),
        _manifest(
            "FeatureSet",
            ACTIVITY,
            {
                "description": "The activity of each listing, as of the moment.",
                "inputs": [{"name": "item", "entity": "item", "features": [f"{ACTIVITY}:{name}" for name, *_ in features]}],
            },
        ),
    ]


def _view(name: str, features: tuple[str, ...]) -> dict[str, Any]:
    entity, description = _ABOUT[name]
    columns = [{"name": feature, "dtype": "float32", "default": _DEFAULTS.get(feature, 0.0)} for feature in features]
    return _manifest("FeatureView", name, {"description": description, "entity": {"type": entity, "key": "string"}, "features": columns})


def _manifest(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "plait.dev/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def main() -> None:
    """Write the manifests."""
    for file, found in documents(data_module.load(), "../artifact").items():
        text = "---\n".join(dump(document) for document in found)
        (FOLDER / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
