"""Where one feature stands among the tensors of a feature set, for what looks at a single column of what a model reads.

Pure and without numpy, as all of the registry is.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.registry.records import FeatureSet
from plait.registry.references import parse
from plait.registry.shapes import SetShape


@dataclass(frozen=True, slots=True)
class Place:
    """Column `column` of the input `name`, whose elements are of `dtype`."""

    name: str
    column: int
    dtype: str


def place_of(feature: str, entity: str, feature_set: FeatureSet, shape: SetShape) -> Place | None:
    """Return where "view:feature" of an entity type stands, whichever version is read; None where it is not, or is more than one number."""
    wanted = parse(feature)
    if wanted is None:
        return None
    for item in feature_set.inputs:
        column = 0
        for text in item.features:
            reference, width = parse(text), shape.width(text)
            if reference is None or width is None:
                break
            if item.entity == entity and width == 1 and (reference.view, reference.feature) == (wanted.view, wanted.feature):
                return Place(item.name, column, item.dtype)
            column += width
    return None
