"""How people spell the kinds of resources: `Model`, `models`, `feature-view`, `fs`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from plait.registry.records import Kind

_SPELLINGS: dict[str, Kind] = {
    "model": "Model",
    "route": "Route",
    "featureview": "FeatureView",
    "view": "FeatureView",
    "fv": "FeatureView",
    "featureset": "FeatureSet",
    "set": "FeatureSet",
    "fs": "FeatureSet",
    "tenant": "Tenant",
    "experiment": "Experiment",
    "pool": "Pool",
}
NAMES = ("models", "routes", "featureviews", "featuresets", "tenants", "experiments", "pools")


def parse(text: str) -> Kind:
    """Return the kind meant. Raises typer.BadParameter naming the closest one."""
    word = text.lower().replace("-", "").replace("_", "")
    for spelling in (word, word.removesuffix("s")):
        if spelling in _SPELLINGS:
            return _SPELLINGS[spelling]
    close = difflib.get_close_matches(word, NAMES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(NAMES)}"
    raise typer.BadParameter(f"{text!r} is not a kind; {hint}")


def complete(incomplete: str) -> list[str]:
    """Return the kinds that start like this, for the shell."""
    return [name for name in NAMES if name.startswith(incomplete.lower())]
