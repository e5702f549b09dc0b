"""Does a feature set fit its views? What it names is there, in the pinned version, about the right entity, and can become its tensors.

Pure, one part of `crosschecks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from plait.dtypes import BY_NAME
from plait.registry import expressions
from plait.registry.explain import suggestion
from plait.registry.feature_rules import holds
from plait.registry.findings import Finding, Steps
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, RequestFeature, Snapshot, Transform
from plait.registry.references import Reference, parse
from plait.registry.shapes import SetShape, tree_of, view_of

MAX_COLUMNS: Final = 16_384  # of one input
_FLOATS: Final = ("float16", "float32", "float64")
# Up to which whole number a tensor of a dtype tells every one from the next.
_EXACT: Final = {
    "bool": 0, "int8": 127, "int16": 2**15 - 1, "int32": 2**31 - 1, "int64": 2**63 - 1,
    "float16": 2**11, "float32": 2**24, "float64": 2**53,
}  # fmt: skip


def check(feature_set: FeatureSet, snapshot: Snapshot, *, strict: bool = True) -> Iterator[Finding]:
    """Yield everything in which a set does not fit. Not `strict`: only what makes it unreadable, as the router asks of what is stored."""
    keys = _Keys()
    shape = SetShape(feature_set, snapshot.feature_views)
    for index, item in enumerate(feature_set.inputs):
        for place, text in enumerate(item.features):
            steps: Steps = ("inputs", index, "features", place)
            reference = parse(text)
            if reference is None:
                continue
            for message in _column(item, reference, shape, snapshot, strict=strict):
                yield steps, message
            for operand in shape.operands(text):
                for message in keys.differ(operand, item, snapshot):
                    yield steps, message
        columns = shape.columns_of(item)
        if columns is not None and columns > MAX_COLUMNS:
            yield ("inputs", index, "features"), f"take {columns} columns; at most {MAX_COLUMNS} are allowed in one input"
    yield from _transforms(feature_set, shape, snapshot)


def views_read(feature_set: FeatureSet) -> tuple[Reference, ...]:
    """Return the stored features a set reads, those of its transforms included, also of those no input uses."""
    texts = [text for item in feature_set.inputs for text in item.features]
    texts += [f"$transform:{transform.name}" for transform in feature_set.transforms]
    shape = SetShape(feature_set, {})
    found = [operand for text in texts for operand in shape.operands(text) if operand.kind == "stored"]
    return tuple(dict.fromkeys(found))


class _Keys:
    """That every view of one entity type in a set takes the same ids."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Entity, str]] = {}  # entity type → (entity, the view that said so)

    def differ(self, reference: Reference, item: ModelInput, snapshot: Snapshot) -> Iterator[str]:
        view = None if reference.kind != "stored" else view_of(reference, snapshot.feature_views)
        if view is None:
            return
        entity, first = self._known.setdefault(view.entity.type, (view.entity, view.name))
        if entity.key != view.entity.key:
            both = f"view {view.name!r} has {view.entity.key} keys, but {first!r} has {entity.key} keys"
            yield f"{both} for the same entity {view.entity.type!r}"
        elif [part.type for part in entity.parts] != [part.type for part in view.entity.parts]:
            yield f"view {view.name!r} and {first!r} have keys of different parts for the same entity {view.entity.type!r}"


def _column(item: ModelInput, reference: Reference, shape: SetShape, snapshot: Snapshot, *, strict: bool) -> Iterator[str]:
    if reference.kind == "stored":
        yield from _stored(item, reference, shape, snapshot, strict=strict)
        return
    found = shape.find(reference)
    if isinstance(found, RequestFeature):
        yield from _cast(str(reference), found.dtype, item, wide=not strict)
    elif isinstance(found, Transform) and found.default is not None and not _takes(item.dtype, found.default):
        yield f"the default of {reference}, {found.default:g}, is no {item.dtype}"


def _takes(dtype: str, value: float) -> bool:
    return holds(dtype, value) if dtype != "bool" else value in (0, 1)


def _stored(item: ModelInput, reference: Reference, shape: SetShape, snapshot: Snapshot, *, strict: bool) -> Iterator[str]:
    view = view_of(reference, snapshot.feature_views)
    if view is None:
        yield _no_view(reference, snapshot)
        return
    if view.entity.type != item.entity:
        yield f"view {view.name!r} is about {view.entity.type!r}, but this input is about {item.entity!r}; one input takes one entity type"
    feature = shape.find(reference)
    if not isinstance(feature, Feature):
        yield _no_feature(reference, view)
        return
    yield from _fits(str(reference), feature, item, wide=not strict)
    if strict and feature.default is None and _was_appended(view, feature):
        yield (
            f"{reference} was appended to a view that has rows and has no default, so those rows would be NaN or 0: give it a default, "
            f"or set version: {view.version + 1} of the view"
        )


def _no_view(reference: Reference, snapshot: Snapshot) -> str:
    view = snapshot.feature_views.get(reference.view)
    if view is None:
        return f"there is no feature view {reference.view!r}{suggestion(reference.view, list(snapshot.feature_views))}"
    kept = ", ".join(map(str, (*(past.version for past in view.versions), view.version)))
    return (
        f"view {view.name!r} has no version {reference.version} at hand; it has {kept}: an older one comes back when the view is applied "
        "together with a set that pins it"
    )


def _no_feature(reference: Reference, view: FeatureView) -> str:
    which = f"view {view.name!r}" if reference.version is None else f"version {reference.version} of view {view.name!r}"
    return f"{which} has no feature {reference.feature!r}{suggestion(reference.feature, [f.name for f in view.features])}"


def _was_appended(view: FeatureView, feature: Feature) -> bool:
    return bool(view.schemas) and feature.name not in {f.name for f in view.schemas[0].features}


def _fits(name: str, feature: Feature, item: ModelInput, *, wide: bool) -> Iterator[str]:
    """Whether a stored feature can be cast to a tensor's dtype without becoming something else."""
    if feature.dtype == "string":
        largest = len(feature.vocabulary) or feature.hash_buckets - 1
        if item.dtype == "bool" or largest > _EXACT[item.dtype]:
            yield f"{name} is coded up to {largest} and does not fit {item.dtype}: use int32"
    elif feature.dtype == "timestamp":
        if item.dtype not in ("int64", "float64"):
            yield f"{name} is a timestamp in microseconds and does not fit {item.dtype}: use int64, or time_since in a transform"
    else:
        yield from _cast(name, "float32" if feature.scale else feature.dtype, item, wide=wide)


def _cast(name: str, dtype: str, item: ModelInput, *, wide: bool) -> Iterator[str]:
    """`wide`: an int32 tensor may take an int64, as it always could."""
    if item.dtype in _FLOATS:
        return
    if dtype in _FLOATS:
        yield f"{name} is {dtype} and cannot be cast to {item.dtype}: a missing value is NaN"
        return
    wider = BY_NAME[dtype].size_bytes > BY_NAME[item.dtype].size_bytes and not (wide and item.dtype == "int32")
    if dtype != "bool" and (wider or item.dtype == "bool"):
        yield f"{name} is {dtype} and does not fit {item.dtype}: larger numbers would come out as others"


def _transforms(feature_set: FeatureSet, shape: SetShape, snapshot: Snapshot) -> Iterator[Finding]:
    cells = 0
    for index, transform in enumerate(feature_set.transforms):
        at: Steps = ("transforms", index, "expression")
        tree = tree_of(transform)
        if tree is None:
            continue  # `feature_rules` tells it
        missing = list(_missing_operands(tree, shape, snapshot))
        for message in missing:
            yield at, message
        widths = {text: shape.width(text) for text in expressions.references(tree)}
        if missing or None in widths.values():
            continue
        try:
            cells += expressions.check(tree, {text: width for text, width in widths.items() if width is not None}).cells
        except expressions.ExpressionError as error:
            yield at, str(error)
    if cells > expressions.MAX_CELLS:
        yield ("transforms",), f"compute {cells} numbers a row; at most {expressions.MAX_CELLS} are allowed in a set"


def _missing_operands(tree: expressions.Expression, shape: SetShape, snapshot: Snapshot) -> Iterator[str]:
    for node in expressions.walk(tree):
        reference = parse(node.reference) if isinstance(node, expressions.Operand) else None
        if reference is None or reference.kind != "stored":
            continue
        view = view_of(reference, snapshot.feature_views)
        if view is None:
            yield f"column {node.column}: {_no_view(reference, snapshot)}"
        elif shape.find(reference) is None:
            yield f"column {node.column}: {_no_feature(reference, view)}"
