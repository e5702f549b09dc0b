"""A feature set compiled against its views: which bytes of which row go into which columns of which tensor.

Compiled once per registry snapshot and immutable, so that a request only moves bytes. Only the features a model's inputs name are touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import Bytes2D, KeySpace, RowCodec
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry.explain import suggestion
from plait.registry.records import FeatureSchema, FeatureSet, FeatureView, KeyKind, ModelInput, Snapshot

_MAX_SPACES: Final = 1024  # tenants, per view


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring columns of one dtype in a row that are neighbours in a tensor: one copy moves them all."""

    row_from: int
    row_to: int
    dtype: np.dtype[np.generic]
    tensor: int
    column_from: int
    column_to: int


@dataclass(frozen=True, slots=True)
class Picture:
    """How rows of one schema map to the tensors."""

    codec: RowCodec
    runs: tuple[Run, ...]
    null_mask: Bytes2D  # bits of the asked columns this schema has
    absent: bool  # an asked column is younger than this schema, so every such row has a null


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """What is read of one view. `cells[tensor]` are the tensor's columns that come from it, `defaults[tensor]` what stands in."""

    view: FeatureView
    current: Picture
    pictures: Mapping[int, Picture]  # by schema id
    cells: Mapping[int, npt.NDArray[np.intp]]
    names: Mapping[int, tuple[str, ...]]  # parallel to cells
    defaults: Mapping[int, npt.NDArray[np.generic]]
    has_all_defaults: bool
    spaces: dict[str, KeySpace] = field(default_factory=dict, compare=False, repr=False)  # by tenant, made when first asked for

    def key_space(self, tenant: str) -> KeySpace:
        """Return the keys of this view for a tenant."""
        space = self.spaces.get(tenant)
        if space is None:
            space = KeySpace.of(tenant, self.view.entity.type, self.view.name, self.view.version)
            if len(self.spaces) < _MAX_SPACES:
                self.spaces[tenant] = space
        return space


@dataclass(frozen=True, slots=True)
class EntityPlan:
    """Everything read for one entity type."""

    entity_type: str
    key: KeyKind
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
class Plan:
    """A compiled feature set, or the part of it that the asked inputs need."""

    feature_set: FeatureSet
    tensors: tuple[TensorPlan, ...]
    entities: tuple[EntityPlan, ...]


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
    chosen = [i for i in feature_set.inputs if not inputs or i.name in inputs]
    tensors = tuple(_tensor(i) for i in chosen)
    entities = tuple(_entity(snapshot, feature_set, chosen, entity_type) for entity_type in dict.fromkeys(i.entity for i in chosen))
    return Plan(feature_set, tensors, entities)


def schemas_of(view: FeatureView) -> tuple[FeatureSchema, ...]:
    """Return the schemas rows of a view may have, oldest first; a record that never passed through the store has just its own."""
    return view.schemas or (FeatureSchema(id=1, features=view.features),)


def _tensor(model_input: ModelInput) -> TensorPlan:
    dtype = BY_NAME[model_input.dtype]
    return TensorPlan(model_input.name, model_input.entity, np.dtype(dtype.numpy), dtype.number, len(model_input.features))


def _entity(snapshot: Snapshot, feature_set: FeatureSet, chosen: list[ModelInput], entity_type: str) -> EntityPlan:
    tensors = tuple(at for at, i in enumerate(chosen) if i.entity == entity_type)
    # (view name → tensor → [(column, feature name)])
    wanted: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for at in tensors:
        for column, reference in enumerate(chosen[at].features):
            view_name, _, feature = reference.partition(":")
            wanted.setdefault(view_name, {}).setdefault(at, []).append((column, feature))
    plans = []
    for view_name, cells in wanted.items():
        view = snapshot.feature_views.get(view_name)
        if view is None or view.entity.type != entity_type:
            raise FailedPrecondition(
                f"feature set {feature_set.name!r} needs a view {view_name!r} of entity {entity_type!r}, which the registry does not have: apply it",
                reason="FEATURE_SET_BROKEN",
            )
        plans.append(_view(feature_set, view, cells, [np.dtype(BY_NAME[i.dtype].numpy) for i in chosen]))
    return EntityPlan(entity_type, plans[0].view.entity.key, tuple(plans), tensors)


def _view(
    feature_set: FeatureSet, view: FeatureView, cells: dict[int, list[tuple[int, str]]], dtypes: list[np.dtype[np.generic]]
) -> ViewPlan:
    features = {feature.name: feature for feature in view.features}
    missing = sorted({name for wanted in cells.values() for _, name in wanted} - features.keys())
    if missing:
        raise FailedPrecondition(
            f"feature set {feature_set.name!r} names {missing} of view {view.name!r}, which does not have them: apply a view that does",
            reason="FEATURE_SET_BROKEN",
        )
    pictures = {schema.id: _picture(schema, cells) for schema in schemas_of(view)}
    asked = {name for wanted in cells.values() for _, name in wanted}
    return ViewPlan(
        view=view,
        current=pictures[schemas_of(view)[-1].id],
        pictures=pictures,
        cells={at: np.array([column for column, _ in wanted], np.intp) for at, wanted in cells.items()},
        names={at: tuple(name for _, name in wanted) for at, wanted in cells.items()},
        defaults={at: np.array([features[name].stand_in for _, name in wanted]).astype(dtypes[at]) for at, wanted in cells.items()},
        has_all_defaults=all(features[name].default is not None for name in asked),
    )


def _picture(schema: FeatureSchema, cells: dict[int, list[tuple[int, str]]]) -> Picture:
    codec = RowCodec(schema)
    runs: list[Run] = []
    asked: list[str] = []
    absent = False
    for at, wanted in cells.items():
        for column, name in wanted:
            source = codec.columns.get(name)
            if source is None:
                absent = True
                continue
            asked.append(name)
            end = source.offset + source.dtype.itemsize
            last = runs[-1] if runs else None
            if (
                last is not None
                and last.tensor == at
                and (last.row_to, last.column_to, last.dtype) == (source.offset, column, source.dtype)
            ):
                runs[-1] = Run(last.row_from, end, last.dtype, at, last.column_from, column + 1)
            else:
                runs.append(Run(source.offset, end, source.dtype, at, column, column + 1))
    return Picture(codec, tuple(runs), codec.null_mask(asked), absent)
