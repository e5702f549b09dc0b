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


class SetShape:
    """One feature set against the views it reads: what its references are and how wide. Names are indexed and widths worked out once, so
    make one per set and snapshot."""

    def __init__(self, feature_set: FeatureSet, views: Views) -> None:
        self._views = views
        self._sent = {feature.name: feature for feature in feature_set.request}
        self._computed = {transform.name: transform for transform in feature_set.transforms}
        self._features: dict[tuple[str, int | None], Mapping[str, Feature]] = {}
        self._read: dict[str, tuple[Reference, ...]] = {}
        self._widths: dict[str, int | None] = {}

    def find(self, reference: Reference) -> Resolved | None:
        """Return what a reference of the set names, None where it is not there."""
        if reference.kind == "request":
            return self._sent.get(reference.feature)
        if reference.kind == "transform":
            return self._computed.get(reference.feature)
        key = (reference.view, reference.version)
        if key not in self._features:
            view = view_of(reference, self._views)
            self._features[key] = {} if view is None else {feature.name: feature for feature in view.features}
        return self._features[key].get(reference.feature)

    def width(self, text: str) -> int | None:
        """Return how many columns a reference takes in a tensor, None where it (or what it is computed from) cannot be found or read."""
        if text not in self._widths:
            self._widths[text] = self._width(text)
        return self._widths[text]

    def _width(self, text: str) -> int | None:
        reference = parse(text)
        found = None if reference is None else self.find(reference)
        if found is None:
            return None
        if isinstance(found, Feature):
            return width_of(found)
        return 1 if isinstance(found, RequestFeature) else self.transform_width(found)

    def transform_width(self, transform: Transform) -> int | None:
        """Return how many columns a transform yields, None where it cannot be read or computed."""
        tree = tree_of(transform)
        if tree is None:
            return None
        widths = {text: self.width(text) for text in expressions.references(tree)}
        if None in widths.values():
            return None
        try:
            return expressions.check(tree, {text: found for text, found in widths.items() if found is not None}).width
        except expressions.ExpressionError:
            return None

    def operands(self, text: str) -> tuple[Reference, ...]:
        """Return what a reference reads: itself, or the operands of a transform (none where that cannot be read)."""
        if text not in self._read:
            self._read[text] = self._operands(text)
        return self._read[text]

    def _operands(self, text: str) -> tuple[Reference, ...]:
        reference = parse(text)
        if reference is None or reference.kind != "transform":
            return () if reference is None else (reference,)
        transform = self._computed.get(reference.feature)
        tree = None if transform is None else tree_of(transform)
        read = () if tree is None else expressions.references(tree)
        return tuple(found for each in read if (found := parse(each)) is not None)

    def columns_of(self, item: ModelInput) -> int | None:
        """Return how many columns an input's tensor has, None where a reference cannot be resolved."""
        widths = [self.width(text) for text in item.features]
        return None if None in widths else sum(found or 0 for found in widths)

    def default_columns(self, item: ModelInput) -> list[float | int]:
        """Return the row that stands where nothing is known, one number per column, to be cast to the input's dtype.

        A transform's is its declared default, whatever its operands' defaults would yield. Raises KeyError for what cannot be resolved.
        """
        row: list[float | int] = []
        for text in item.features:
            reference = parse(text)
            found = None if reference is None else self.find(reference)
            columns = self.width(text)
            if found is None or columns is None:
                raise KeyError(text)
            row += stand_ins(found) if isinstance(found, Feature) else [_stand_in_of(found, item)] * columns
        return row

    def views_of(self, item: ModelInput) -> tuple[FeatureView, ...]:
        """Return the views an input is made from, each once, in order of first use; those of its transforms' operands included."""
        read = dict.fromkeys((r.view, r.version) for text in item.features for r in self.operands(text) if r.kind == "stored")
        found = [view_of(Reference("stored", view, version, ""), self._views) for view, version in read]
        return tuple({(view.name, view.version): view for view in found if view is not None}.values())

    def entities_of(self, item: ModelInput) -> tuple[str, ...]:
        """Return the entity types whose ids an input needs: its own, and those that its transforms read besides."""
        return tuple(dict.fromkeys((item.entity, *(view.entity.type for view in self.views_of(item)))))


def tree_of(transform: Transform) -> expressions.Expression | None:
    """Return a transform's expression, None where it cannot be read."""
    try:
        return expressions.parse(transform.expression)
    except expressions.ExpressionError:
        return None


def view_of(reference: Reference, views: Views) -> FeatureView | None:
    """Return the view a stored reference names, in the version it pins; None where there is none."""
    view = views.get(reference.view)
    return None if view is None else view.at(reference.version)


def find(reference: Reference, feature_set: FeatureSet, views: Views) -> Resolved | None:
    """Return what one reference of a set names; see `SetShape.find` for many."""
    return SetShape(feature_set, views).find(reference)


def width(text: str, feature_set: FeatureSet, views: Views) -> int | None:
    """Return how many columns one reference takes; see `SetShape.width` for many."""
    return SetShape(feature_set, views).width(text)


def transform_width(transform: Transform, feature_set: FeatureSet, views: Views) -> int | None:
    """Return how many columns one transform yields; see `SetShape.transform_width` for many."""
    return SetShape(feature_set, views).transform_width(transform)


def _stand_in_of(computed: RequestFeature | Transform, item: ModelInput) -> float | int:
    if computed.default is not None:
        return computed.default
    return math.nan if item.dtype.startswith("float") else 0
