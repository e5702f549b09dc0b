"""A feature set compiled against its views: which bytes of which row go into which columns of which tensor.

Compiled once per registry snapshot and immutable, so that a request only moves bytes. Only the features a model's inputs name are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.computed import Computed
from feature_retrieval.row_codec import Bytes2D, KeySpace, RowCodec
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
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
)
from plait.registry.references import Reference, parse, width_of
from plait.registry.shapes import stand_in

_MAX_SPACES: Final = 1024  # tenants, per view

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring columns of one dtype in a row that are neighbours in a tensor: one copy moves them all, times `scale` unless it is 0."""

    row_from: int
    row_to: int
    dtype: np.dtype[np.generic]
    tensor: int
    column_from: int
    column_to: int
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class ComputedColumn:
    """A column that is worked out from the row, and where it goes."""

    computed: Computed
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
class Plan:
    """A compiled feature set, or the part of it that the asked inputs need. The first `answered` tensors are answered."""

    feature_set: FeatureSet
    tensors: tuple[TensorPlan, ...]
    answered: int
    entities: tuple[EntityPlan, ...]
    request: tuple[RequestColumn, ...]
    inputs: tuple[ModelInput, ...]


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
        raise NotFound(f"no feature set {name!r}{hint}: see 'plait get featureset' for what there is", reason="FEATURE_SET_NOT_FOUND")
    unknown = set(inputs) - {i.name for i in feature_set.inputs}
    if unknown or len(set(inputs)) != len(inputs):
        raise InvalidArgument(
            f"inputs: {sorted(unknown) or 'some are given twice'}; feature set {name!r} has {[i.name for i in feature_set.inputs]}"
        )
    return _Compiler(snapshot, feature_set, tuple(i for i in feature_set.inputs if not inputs or i.name in inputs)).plan()


def schemas_of(view: FeatureView) -> tuple[FeatureSchema, ...]:
    """Return the schemas rows of a view may have, oldest first; a record that never passed through the store has just its own."""
    return view.schemas or (FeatureSchema(id=1, features=view.features),)


_Wanted = dict[int, list[tuple[int, str, int]]]  # tensor → (column, feature name, which of its values), one per column


class _Compiler:
    """Compiles some inputs of one set: every reference gets its columns, then every view its part of them."""

    def __init__(self, snapshot: Snapshot, feature_set: FeatureSet, inputs: tuple[ModelInput, ...]) -> None:
        self._snapshot = snapshot
        self._set = feature_set
        self._inputs = inputs
        self._declared = {feature.name: feature for feature in feature_set.request}
        self._dtypes = [np.dtype(BY_NAME[i.dtype].numpy) for i in inputs]
        self._widths: list[int] = []
        self._stored: dict[str, dict[tuple[str, int | None], _Wanted]] = {i.entity: {} for i in inputs}  # by entity type, then view
        self._sent: dict[str, dict[int, list[int]]] = {}  # request feature → tensor → columns

    def plan(self) -> Plan:
        for at, item in enumerate(self._inputs):
            self._widths.append(self._columns(at, item))
        tensors = tuple(
            TensorPlan(i.name, i.entity, dtype, BY_NAME[i.dtype].number, width)
            for i, dtype, width in zip(self._inputs, self._dtypes, self._widths, strict=True)
        )
        request = tuple(
            RequestColumn(self._declared[name], {at: np.array(columns, np.intp) for at, columns in cells.items()})
            for name, cells in self._sent.items()
        )
        entities = tuple(self._entity(entity_type) for entity_type in self._stored)
        return Plan(self._set, tensors, len(self._inputs), entities, request, self._inputs)

    def _columns(self, at: int, item: ModelInput) -> int:
        """Give every feature of an input its columns; return how many there are."""
        column = 0
        for text in item.features:
            reference = parse(text)
            if reference is None or reference.kind == "transform":
                raise self._broken(f"names {text!r}, which is no feature that can be read")
            if reference.kind == "request":
                self._request(reference.feature, item).setdefault(at, []).append(column)
                column += 1
                continue
            feature = self._feature(reference, item.entity)
            wanted = self._stored[item.entity].setdefault((reference.view, reference.version), {}).setdefault(at, [])
            wanted += [(column + n, reference.feature, n) for n in range(width_of(feature))]
            column += width_of(feature)
        return column

    def _request(self, name: str, item: ModelInput) -> dict[int, list[int]]:
        feature = self._declared.get(name)
        if feature is None or feature.entity not in ("", item.entity):
            raise self._broken(f"names $request:{name} in input {item.name!r}, but declares no such request feature for {item.entity!r}")
        return self._sent.setdefault(name, {})

    def _feature(self, reference: Reference, entity_type: str) -> Feature:
        view = self._view(reference.view, reference.version, entity_type)
        feature = next((f for f in view.features if f.name == reference.feature), None)
        if feature is None:
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
        tensors = tuple(at for at, i in enumerate(self._inputs) if i.entity == entity_type)
        return EntityPlan(entity_type, plans[0].view.entity if plans else None, plans, tensors)

    def _view_plan(self, view: FeatureView, cells: _Wanted) -> ViewPlan:
        features = {feature.name: feature for feature in view.features}
        pictures = {schema.id: _picture(schema, cells) for schema in schemas_of(view)}
        asked = {name for wanted in cells.values() for _, name, _ in wanted}
        answered = len(self._inputs)
        snapshot, name, version = self._snapshot, view.name, view.version
        return ViewPlan(
            view=view,
            current=pictures[schemas_of(view)[-1].id],
            pictures=pictures,
            cells={at: np.array([column for column, _, _ in wanted], np.intp) for at, wanted in cells.items()},
            names={at: tuple(name for _, name, _ in wanted) for at, wanted in cells.items()},
            defaults={
                at: np.array([stand_in(features[name]) for _, name, _ in wanted]).astype(self._dtypes[at]) for at, wanted in cells.items()
            },
            has_all_defaults=all(features[name].default is not None for name in asked),
            answered=answered,
            answered_cells=sum(len(wanted) for at, wanted in cells.items() if at < answered),
            epoch_of=lambda tenant: snapshot.epochs_of(tenant, name, version).serving,
        )


def _picture(schema: FeatureSchema, cells: _Wanted) -> Picture:
    codec = RowCodec(schema)
    runs: list[Run] = []
    for at, wanted in cells.items():
        for column, name, element in wanted:
            source = codec.columns.get(name)
            if source is not None:
                begin = source.offset + element * source.dtype.itemsize
                _add_run(runs, Run(begin, begin + source.dtype.itemsize, source.dtype, at, column, column + 1, source.scale))
    sources = {
        at: np.array([codec.columns[name].index if name in codec.columns else -1 for _, name, _ in wanted], np.intp)
        for at, wanted in cells.items()
    }
    asked = dict.fromkeys(name for wanted in cells.values() for _, name, _ in wanted)
    known = [name for name in asked if name in codec.columns]
    return Picture(codec, tuple(runs), codec.null_mask(known), len(known) < len(asked), sources)


def _add_run(runs: list[Run], run: Run) -> None:
    """Lengthen the last run where the next column is its neighbour in the row and in the tensor."""
    last = runs[-1] if runs else None
    if last is not None and _neighbour(last) == (run.tensor, run.row_from, run.column_from, run.dtype, run.scale):
        run = replace(run, row_from=last.row_from, column_from=last.column_from)
        runs.pop()
    runs.append(run)


def _neighbour(run: Run) -> tuple[object, ...]:
    return run.tensor, run.row_to, run.column_to, run.dtype, run.scale
