"""A feature set compiled against its views: which bytes of which row go into which columns of which tensor.

Compiled once per registry snapshot and immutable, so that a request only moves bytes. Only the features a model's inputs name are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.aggregation.windows import window_of
from feature_retrieval.computed import Computed
from feature_retrieval.row_codec import Bytes2D, KeySpace, RowCodec
from feature_retrieval.transforms import CompiledTransform, compile_transform, operand_default, operand_dtype
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry import expressions
from plait.registry.explain import suggestion
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSchema,
    FeatureSet,
    FeatureView,
    ModelInput,
    RequestFeature,
    Snapshot,
    Transform,
)
from plait.registry.references import Reference, parse, width_of
from plait.registry.shapes import stand_in, transform_width

_MAX_SPACES: Final = 1024  # tenants, per view

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring columns of one dtype in a row that are neighbours in a tensor: one copy moves them all, times `scale` unless it is 0.

    `narrows`: the row may hold finite numbers that are beyond the tensor's dtype.
    """

    row_from: int
    row_to: int
    dtype: np.dtype[np.generic]
    tensor: int
    column_from: int
    column_to: int
    scale: float = 0.0
    narrows: bool = False


@dataclass(frozen=True, slots=True)
class ComputedColumn:
    """A column that is worked out from bytes of the row, and where it goes. `source` is the codec's column, whose null it may be."""

    computed: Computed
    row_from: int
    row_to: int
    source: int
    tensor: int
    column: int


@dataclass(frozen=True, slots=True)
class Picture:
    """How rows of one schema map to the tensors. `sources[tensor]`, parallel to the view's cells: which column of the codec, -1 = none."""

    codec: RowCodec
    runs: tuple[Run, ...]
    null_mask: Bytes2D  # bits of the asked columns this schema has
    absent: bool  # an asked column is younger than this schema, so every such row has a null
    sources: Mapping[int, Index]
    computed: tuple[ComputedColumn, ...] = ()


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """What is read of one version of a view.

    `cells[tensor]` are the tensor's columns that come from it, `names[tensor]` the feature of each and `defaults[tensor]` what stands in.
    Tensors below `answered` are answered, the others only worked with; `answered_cells` counts the cells of a row in the former.
    """

    view: FeatureView
    current: Picture
    pictures: Mapping[int, Picture]  # by schema id
    cells: Mapping[int, Index]
    names: Mapping[int, tuple[str, ...]]  # parallel to cells
    defaults: Mapping[int, npt.NDArray[np.generic]]
    has_all_defaults: bool
    answered: int
    answered_cells: int
    epoch_of: Callable[[str], int]  # by tenant: the one that is served
    spaces: dict[str, KeySpace] = field(default_factory=dict, compare=False, repr=False)  # by tenant, made when first asked for

    def key_space(self, tenant: str) -> KeySpace:
        """Return the keys of this view for a tenant."""
        space = self.spaces.get(tenant)
        if space is None:
            view = self.view
            space = KeySpace.of(tenant, view.entity.type, view.name, view.version, self.epoch_of(tenant))
            if view.feast is not None:
                space = space.foreign()
            if len(self.spaces) < _MAX_SPACES:
                self.spaces[tenant] = space
        return space


@dataclass(frozen=True, slots=True)
class EntityPlan:
    """Everything read for one entity type. `entity` is None where no view is read: then ids of any kind say how many rows there are."""

    entity_type: str
    entity: Entity | None
    views: tuple[ViewPlan, ...]
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the answer: [ids of its entity type, width]."""

    name: str
    entity_type: str
    dtype: np.dtype[np.generic]
    number: int  # plait.api.types.v1.DataType
    width: int


@dataclass(frozen=True, slots=True)
class RequestColumn:
    """A feature that is sent along, and the columns of each tensor that it fills."""

    feature: RequestFeature
    cells: Mapping[int, Index]


@dataclass(frozen=True, slots=True)
class OperandPlan:
    """What a transform reads: a tensor that was gathered for it, or a request feature. `entity_type` is empty for one per request."""

    reference: str
    entity_type: str
    tensor: int = -1
    request: str = ""


@dataclass(frozen=True, slots=True)
class TransformPlan:
    """A column, or several, to be computed. `places`: (tensor, first column, behind the last one), each `width` columns."""

    transform: Transform
    compiled: CompiledTransform
    operands: tuple[OperandPlan, ...]
    width: int
    places: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled feature set, or the part of it that the asked inputs need.

    The first `answered` tensors are answered, parallel to `inputs`; the others are what transforms read.
    """

    feature_set: FeatureSet
    tensors: tuple[TensorPlan, ...]
    answered: int
    entities: tuple[EntityPlan, ...]
    request: tuple[RequestColumn, ...]
    transforms: tuple[TransformPlan, ...]
    inputs: tuple[ModelInput, ...]
    restricted: tuple[FeatureView, ...]  # views that name who may read them


class Plans:
    """The compiled feature sets of one snapshot, made when first asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._compiled: dict[tuple[str, tuple[str, ...]], Plan] = {}

    def get(self, name: str, inputs: Sequence[str]) -> Plan:
        """Return the plan for a set and some of its inputs (none = all).

        Raises NotFound (FEATURE_SET_NOT_FOUND), InvalidArgument for an input the set does not have, FailedPrecondition
        (FEATURE_SET_BROKEN) where it names a view or feature that is not there.
        """
        wanted = tuple(inputs)
        plan = self._compiled.get((name, wanted))
        if plan is None:
            plan = compile_plan(self.snapshot, name, wanted)
            if len(self._compiled) < 1024:  # a caller may ask for any subset of inputs: bound what that costs us
                self._compiled[(name, wanted)] = plan
        return plan


def compile_plan(snapshot: Snapshot, name: str, inputs: tuple[str, ...] = ()) -> Plan:
    """Compile one feature set; errors as in `Plans.get`."""
    feature_set = snapshot.feature_sets.get(name)
    if feature_set is None:
        hint = suggestion(name, list(snapshot.feature_sets))
        raise NotFound(f"no feature set {name[:80]!r}{hint}: see 'plait get featureset' for what there is", reason="FEATURE_SET_NOT_FOUND")
    unknown = set(inputs) - {i.name for i in feature_set.inputs}
    if unknown or len(set(inputs)) != len(inputs):
        raise InvalidArgument(
            f"inputs: {[name[:80] for name in sorted(unknown)[:8]] or 'some are given twice'}; feature set {name!r} has {[i.name for i in feature_set.inputs]}"
        )
    return _Compiler(snapshot, feature_set, tuple(i for i in feature_set.inputs if not inputs or i.name in inputs)).plan()


def schemas_of(view: FeatureView) -> tuple[FeatureSchema, ...]:
    """Return the schemas rows of a view may have, oldest first; a record that never passed through the store has just its own."""
    return view.schemas or (FeatureSchema(id=1, features=view.features),)


_Wanted = dict[int, list[tuple[int, str, int]]]  # tensor → (column, feature name, which of its values), one per column
_ViewKey = tuple[str, int | None]  # name, pinned version


class _Compiler:
    """Compiles some inputs of one set: every reference gets its columns, then every view its part of them.

    What transforms read besides is gathered in tensors of its own, behind those that are answered.
    """

    def __init__(self, snapshot: Snapshot, feature_set: FeatureSet, inputs: tuple[ModelInput, ...]) -> None:
        self._snapshot = snapshot
        self._set = feature_set
        self._inputs = inputs
        self._tensors = [TensorPlan(i.name, i.entity, np.dtype(BY_NAME[i.dtype].numpy), BY_NAME[i.dtype].number, 0) for i in inputs]
        self._stored: dict[str, dict[_ViewKey, _Wanted]] = {i.entity: {} for i in inputs}  # by entity type
        self._sent: dict[str, dict[int, list[int]]] = {}  # request feature → tensor → columns
        self._gathered: dict[str, int] = {}  # reference that a transform reads → its tensor
        self._transforms: dict[str, TransformPlan] = {}
        self._features: dict[tuple[str, int | None, str], Mapping[str, Feature]] = {}  # by name; of (view, pinned version, entity type)

    def plan(self) -> Plan:
        for at, item in enumerate(self._inputs):
            self._tensors[at] = replace(self._tensors[at], width=self._columns(at, item))
        request = tuple(
            RequestColumn(self._declared(name), {at: np.array(columns, np.intp) for at, columns in cells.items()})
            for name, cells in self._sent.items()
        )
        entities = tuple(self._entity(entity_type) for entity_type in self._stored)
        restricted = tuple(view.view for entity in entities for view in entity.views if view.view.readers)
        return Plan(
            self._set,
            tuple(self._tensors),
            len(self._inputs),
            entities,
            request,
            tuple(self._transforms.values()),
            self._inputs,
            restricted,
        )

    def _columns(self, at: int, item: ModelInput) -> int:
        """Give every feature of an input its columns; return how many there are."""
        column = 0
        for text in item.features:
            reference = parse(text)
            if reference is None:
                raise self._broken(f"names {text!r}, which is no feature")
            if reference.kind == "stored":
                column += self._store(at, column, reference, item.entity)
            elif reference.kind == "request":
                self._request(reference.feature, item.entity).setdefault(at, []).append(column)
                column += 1
            else:
                transform = self._transform(reference.feature, item.entity)
                transform.places.append((at, column, column + transform.width))
                column += transform.width
        return column

    def _store(self, at: int, column: int, reference: Reference, entity_type: str) -> int:
        """Give a stored feature its columns of a tensor; return how many."""
        width = width_of(self._feature(reference, entity_type))
        views = self._stored.setdefault(entity_type, {})
        wanted = views.setdefault((reference.view, reference.version), {}).setdefault(at, [])
        wanted += [(column + n, reference.feature, n) for n in range(width)]
        return width

    def _request(self, name: str, entity_type: str) -> dict[int, list[int]]:
        if self._declared(name).entity not in ("", entity_type):
            raise self._broken(f"names $request:{name} for {entity_type!r}, but declares it for {self._declared(name).entity!r}")
        return self._sent.setdefault(name, {})

    def _declared(self, name: str) -> RequestFeature:
        feature = next((f for f in self._set.request if f.name == name), None)
        if feature is None:
            raise self._broken(f"names $request:{name}, but declares no such request feature")
        return feature

    def _transform(self, name: str, entity_type: str) -> TransformPlan:
        known = self._transforms.get(name)
        if known is not None:
            return known
        transform = next((t for t in self._set.transforms if t.name == name), None)
        width = None if transform is None else transform_width(transform, self._set, self._snapshot.feature_views)
        if transform is None or width is None or transform.entity != entity_type:
            raise self._broken(f"names $transform:{name} for {entity_type!r}, which it does not declare, or not so that it can be computed")
        tree = expressions.parse(transform.expression)
        dtypes: dict[str, np.dtype[np.generic]] = {}
        operands: list[OperandPlan] = []
        for text in expressions.references(tree):
            operand, dtypes[text] = self._operand(text)
            operands.append(operand)
        plan = self._transforms[name] = TransformPlan(transform, compile_transform(tree, dtypes), tuple(operands), width, [])
        return plan

    def _operand(self, text: str) -> tuple[OperandPlan, np.dtype[np.generic]]:
        """Have an operand of a transform gathered; return where it will be, and its dtype."""
        reference = parse(text)
        assert reference is not None  # noqa: S101  (the transform has a width, so its operands are there)
        if reference.kind == "request":
            feature = self._declared(reference.feature)
            self._sent.setdefault(feature.name, {})
            return OperandPlan(text, feature.entity, request=feature.name), operand_dtype(feature)
        view = self._snapshot.feature_views[reference.view].at(reference.version)
        assert view is not None  # noqa: S101
        dtype = operand_dtype(self._feature(reference, view.entity.type))
        if text not in self._gathered:
            at = self._gathered[text] = len(self._tensors)
            self._tensors.append(TensorPlan(text, view.entity.type, dtype, 0, 0))
            self._tensors[at] = replace(self._tensors[at], width=self._store(at, 0, reference, view.entity.type))
        return OperandPlan(text, view.entity.type, tensor=self._gathered[text]), dtype

    def _feature(self, reference: Reference, entity_type: str) -> Feature:
        key = (reference.view, reference.version, entity_type)
        features = self._features.get(key)
        if features is None:
            features = self._features[key] = {f.name: f for f in self._view(*key).features}
        feature = features.get(reference.feature)
        if feature is None:
            view = self._view(*key)
            raise self._broken(
                f"names {self._missing(view, reference)} of view {view.name!r}, which does not have them: apply a view that does"
            )
        return feature

    def _missing(self, view: FeatureView, reference: Reference) -> list[str]:
        """Return every feature that the inputs name of a view, as `reference` does, and that it does not have."""
        named = {
            r.feature for i in self._inputs for text in i.features if (r := parse(text)) and r == replace(reference, feature=r.feature)
        }
        return sorted(named - {feature.name for feature in view.features})

    def _view(self, name: str, version: int | None, entity_type: str) -> FeatureView:
        view = self._snapshot.feature_views.get(name)
        pinned = None if view is None else view.at(version)
        if pinned is None or pinned.entity.type != entity_type:
            which = f"version {version} of a view" if version else "a view"
            raise self._broken(f"needs {which} {name!r} of entity {entity_type!r}, which the registry does not have: apply it")
        return pinned

    def _broken(self, what: str) -> FailedPrecondition:
        return FailedPrecondition(f"feature set {self._set.name!r} {what}", reason="FEATURE_SET_BROKEN")

    def _entity(self, entity_type: str) -> EntityPlan:
        views: dict[tuple[str, int], tuple[FeatureView, _Wanted]] = {}  # a pinned version that is the current one is read once
        for (name, version), wanted in self._stored[entity_type].items():
            view = self._view(name, version, entity_type)
            merged = views.setdefault((view.name, view.version), (view, {}))[1]
            for at, columns in wanted.items():
                merged[at] = sorted([*merged.get(at, []), *columns])
        plans = tuple(self._view_plan(view, wanted) for view, wanted in views.values())
        tensors = tuple(at for at, tensor in enumerate(self._tensors) if tensor.entity_type == entity_type)
        return EntityPlan(entity_type, plans[0].view.entity if plans else None, plans, tensors)

    def _view_plan(self, view: FeatureView, cells: _Wanted) -> ViewPlan:
        features = {feature.name: feature for feature in view.features}
        dtypes = {at: self._tensors[at].dtype for at in cells}
        pictures = {schema.id: _picture(schema, cells, dtypes) for schema in schemas_of(view)}
        asked = {name for wanted in cells.values() for _, name, _ in wanted}
        answered = len(self._inputs)
        snapshot, view_name, version = self._snapshot, view.name, view.version

        def defaults(at: int) -> npt.NDArray[np.generic]:
            one = stand_in if at < answered else operand_default
            return np.array([one(features[name]) for _, name, _ in cells[at]]).astype(self._tensors[at].dtype)

        return ViewPlan(
            view=view,
            current=pictures[schemas_of(view)[-1].id],
            pictures=pictures,
            cells={at: np.array([column for column, _, _ in wanted], np.intp) for at, wanted in cells.items()},
            names={at: tuple(name for _, name, _ in wanted) for at, wanted in cells.items()},
            defaults={at: defaults(at) for at in cells},
            has_all_defaults=all(features[name].default is not None for name in asked),
            answered=answered,
            answered_cells=sum(len(wanted) for at, wanted in cells.items() if at < answered),
            epoch_of=lambda tenant: snapshot.epochs_of(tenant, view_name, version).serving,
        )


def _picture(schema: FeatureSchema, cells: _Wanted, dtypes: Mapping[int, np.dtype[np.generic]]) -> Picture:
    """Return how rows of a schema map to tensors of these dtypes."""
    codec = RowCodec(schema)
    runs: list[Run] = []
    computed: list[ComputedColumn] = []
    windows = {feature.name: window_of(feature.aggregate) for feature in schema.features if feature.aggregate is not None}
    for at, wanted in cells.items():
        for column, name, element in wanted:
            source = codec.columns.get(name)
            if source is not None and source.kind == "window":
                computed.append(ComputedColumn(windows[name], source.offset, source.end, source.index, at, column))
            elif source is not None:
                begin = source.offset + element * source.dtype.itemsize
                narrows = _narrows(np.dtype(np.float32) if source.scale else source.dtype, dtypes[at])
                _add_run(runs, Run(begin, begin + source.dtype.itemsize, source.dtype, at, column, column + 1, source.scale, narrows))
    sources = {
        at: np.array([codec.columns[name].index if name in codec.columns else -1 for _, name, _ in wanted], np.intp)
        for at, wanted in cells.items()
    }
    asked = dict.fromkeys(name for wanted in cells.values() for _, name, _ in wanted)
    known = [name for name in asked if name in codec.columns]
    return Picture(codec, tuple(runs), codec.null_mask(known), len(known) < len(asked), sources, tuple(computed))


@cache
def _narrows(source: np.dtype[np.generic], tensor: np.dtype[np.generic]) -> bool:
    """Return whether numbers of one dtype may become infinite in another."""
    if tensor.kind != "f" or source.kind == "b":
        return False
    largest = np.finfo(source).max if source.kind == "f" else np.iinfo(source).max  # type: ignore[type-var]
    return float(largest) > float(np.finfo(tensor).max)  # type: ignore[type-var]


def _add_run(runs: list[Run], run: Run) -> None:
    """Lengthen the last run where the next column is its neighbour in the row and in the tensor."""
    last = runs[-1] if runs else None
    if last is not None and _neighbour(last) == (run.tensor, run.row_from, run.column_from, run.dtype, run.scale):
        run = replace(run, row_from=last.row_from, column_from=last.column_from)
        runs.pop()
    runs.append(run)


def _neighbour(run: Run) -> tuple[object, ...]:
    return run.tensor, run.row_to, run.column_to, run.dtype, run.scale
