"""How wide what a feature set names is, and what stands in where nothing is known: the one answer that the registry's checks, the router's
signatures and feature-retrieval's tensors are built from.

Pure and without numpy, as all of the registry is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

from plait.dtypes import BY_NAME, DType
from plait.registry import expressions
from plait.registry.records import Feature, FeatureSet, FeatureView, ModelInput, RequestFeature, Transform
from plait.registry.references import Reference, parse, width_of

OUT_OF_VOCABULARY: Final = 0
_CODE: Final = BY_NAME["int32"]
_ON_THE_WIRE: Final = {"timestamp": "int64", "string": "bytes"}

Views = Mapping[str, FeatureView]
Resolved = Feature | RequestFeature | Transform


def wire_type(feature: Feature) -> DType:
    """Return the element type of a feature's values in a FeatureBatch: text is BYTES, a timestamp INT64."""
    return BY_NAME[_ON_THE_WIRE.get(feature.dtype, feature.dtype)]


def stored_type(feature: Feature) -> DType:
    """Return the element type of a feature's values in a row: text is its code, an int32."""
    return _CODE if feature.dtype == "string" else wire_type(feature)


def code_of(feature: Feature, text: bytes) -> int:
    """Return the code of a text: 1 + its place in the vocabulary (0 = not in it), or BLAKE2b-64 (RFC 7693; digest_size 8, little-endian)
    modulo `hash_buckets`. To code many, use `feature_retrieval.text_codes`."""
    if feature.hash_buckets:
        return hash_code(text, feature.hash_buckets)
    words = [word.encode() for word in feature.vocabulary]
    return 1 + words.index(text) if text in words else OUT_OF_VOCABULARY


def hash_code(text: bytes, buckets: int) -> int:
    """Return the bucket of a text, 0 to buckets - 1."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % buckets


def stand_in(feature: Feature) -> float | int:
    """Return what takes the place of one unknown number: the declared default, coded where it is text; else `pad` for a list, NaN for floats
    (an int8 embedding with a scale is floats to a model) and 0 for the rest."""
    if isinstance(feature.default, str):
        return code_of(feature, feature.default.encode())
    if feature.default is None and (feature.max_length or feature.scale):
        return feature.pad if feature.max_length else math.nan
    return feature.stand_in


def stand_ins(feature: Feature) -> list[float | int]:
    """Return what takes the place of an unknown feature in each of its columns."""
    return [stand_in(feature)] * width_of(feature)


def find(reference: Reference, feature_set: FeatureSet, views: Views) -> Resolved | None:
    """Return what a reference of a set names, None where it is not there."""
    if reference.kind == "request":
        return next((r for r in feature_set.request if r.name == reference.feature), None)
    if reference.kind == "transform":
        return next((t for t in feature_set.transforms if t.name == reference.feature), None)
    view = view_of(reference, views)
    return None if view is None else next((f for f in view.features if f.name == reference.feature), None)


def view_of(reference: Reference, views: Views) -> FeatureView | None:
    """Return the view a stored reference names, in the version it pins; None where there is none."""
    view = views.get(reference.view)
    return None if view is None else view.at(reference.version)


def width(text: str, feature_set: FeatureSet, views: Views) -> int | None:
    """Return how many columns a reference takes in a tensor, None where it (or what it is computed from) cannot be found or read."""
    reference = parse(text)
    found = None if reference is None else find(reference, feature_set, views)
    if found is None:
        return None
    if isinstance(found, Feature):
        return width_of(found)
    return 1 if isinstance(found, RequestFeature) else transform_width(found, feature_set, views)


def transform_width(transform: Transform, feature_set: FeatureSet, views: Views) -> int | None:
    """Return how many columns a transform yields, None where it cannot be read or computed."""
    try:
        tree = expressions.parse(transform.expression)
        widths = {text: width(text, feature_set, views) for text in expressions.references(tree)}
        if None in widths.values():
            return None
        return expressions.check(tree, {text: found for text, found in widths.items() if found is not None}).width
    except expressions.ExpressionError:
        return None


def operands(text: str, feature_set: FeatureSet) -> tuple[Reference, ...]:
    """Return what a reference reads: itself, or the operands of a transform (none where that cannot be parsed)."""
    reference = parse(text)
    if reference is None or reference.kind != "transform":
        return () if reference is None else (reference,)
    transform = next((t for t in feature_set.transforms if t.name == reference.feature), None)
    if transform is None:
        return ()
    try:
        read = expressions.references(expressions.parse(transform.expression))
    except expressions.ExpressionError:
        return ()
    return tuple(found for each in read if (found := parse(each)) is not None)


def columns_of(item: ModelInput, feature_set: FeatureSet, views: Views) -> int | None:
    """Return how many columns an input's tensor has, None where a reference cannot be resolved."""
    widths = [width(text, feature_set, views) for text in item.features]
    return None if None in widths else sum(found or 0 for found in widths)


def default_columns(item: ModelInput, feature_set: FeatureSet, views: Views) -> list[float | int]:
    """Return the row that stands where nothing is known, one number per column, to be cast to the input's dtype.

    A transform's is its declared default, whatever its operands' defaults would yield. Raises KeyError for what cannot be resolved.
    """
    row: list[float | int] = []
    for text in item.features:
        reference = parse(text)
        found = None if reference is None else find(reference, feature_set, views)
        columns = width(text, feature_set, views)
        if found is None or columns is None:
            raise KeyError(text)
        row += stand_ins(found) if isinstance(found, Feature) else [_stand_in_of(found, item)] * columns
    return row


def _stand_in_of(computed: RequestFeature | Transform, item: ModelInput) -> float | int:
    if computed.default is not None:
        return computed.default
    return math.nan if item.dtype.startswith("float") else 0


def views_of(item: ModelInput, feature_set: FeatureSet, views: Views) -> tuple[FeatureView, ...]:
    """Return the views an input is made from, each once, in order of first use; those of its transforms' operands included."""
    found = [view_of(r, views) for text in item.features for r in operands(text, feature_set) if r.kind == "stored"]
    return tuple({(view.name, view.version): view for view in found if view is not None}.values())


def entities_of(item: ModelInput, feature_set: FeatureSet, views: Views) -> tuple[str, ...]:
    """Return the entity types whose ids an input needs: its own, and those that its transforms read besides."""
    return tuple(dict.fromkeys((item.entity, *(view.entity.type for view in views_of(item, feature_set, views)))))
