"""What the business rules of a route look at: the columns of its rules feature set, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from plait.registry.policies import Stages
from plait.registry.records import FeatureSet, ModelInput
from plait.registry.references import parse
from plait.registry.shapes import SetShape


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleColumns:
    """The one input of a rules feature set, and at which place of its rows each column stands."""

    item: ModelInput
    places: Mapping[str, int]


def columns_named(stages: Stages) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield each column that the stages look at, led by the steps to the field that says so."""
    for part, columns in (
        ("filter", [entry.column for entry in stages.filter]),
        ("boost", [entry.column for entry in stages.boost]),
        ("diversity", [entry.column for entry in stages.diversity]),
    ):
        for index, column in enumerate(columns):
            yield (part, index, "column"), column


def rule_columns(feature_set: FeatureSet, shape: SetShape, candidate: str) -> RuleColumns | str:
    """Return the columns of a rules feature set, or what keeps it from being one.

    It has one input, of floats about the candidate, float64 where numbers are to be told apart beyond 2**24. A column is called by its
    whole reference ("listing:sold") or, where no other is called alike, by its last part ("sold"); wide features have no name.
    """
    if len(feature_set.inputs) != 1:
        return f"feature set {feature_set.name!r} has {len(feature_set.inputs)} inputs; one of rules has exactly one"
    item = feature_set.inputs[0]
    if item.entity != candidate or not item.dtype.startswith("float"):
        return f"input {item.name!r} of feature set {feature_set.name!r} must be floats about {candidate!r}; it is {item.dtype} of {item.entity!r}"
    places: dict[str, int] = {}
    ambiguous: set[str] = set()
    at = 0
    for text in item.features:
        width, reference = shape.width(text), parse(text)
        if width is None or reference is None:
            return f"feature set {feature_set.name!r} names {text!r}, which is not there"
        if width == 1:
            ambiguous |= {reference.feature} & places.keys()
            places.setdefault(reference.feature, at)
            places[text] = at
        at += width
    return RuleColumns(item=item, places={name: place for name, place in places.items() if name not in ambiguous})
