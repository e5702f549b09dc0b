"""A GetOnlineFeatures request in our terms: which features, of whose rows. What Feast leaves to names is settled here, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from feature_retrieval.views import Plan, Plans, compile_plan
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry.explain import suggestion
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput
from plait.registry.references import Reference, parse

_SET: Final = "$feast"  # no set can be called so
_MAX_FEATURES: Final = 1000
_MAX_PLANS: Final = 256
_AS_TENSOR: Final = {"string": "int32", "timestamp": "int64"}
_VALUES: Final = {"string_val": str, "int64_val": int, "int32_val": int}

Columns = Mapping[str, Sequence[Any]]  # join key → values


@dataclass(frozen=True, slots=True)
class Wanted:
    """One feature that was asked for."""

    reference: Reference
    view: FeatureView
    feature: Feature

    def name(self, *, full: bool) -> str:
        """As Feast calls it in an answer."""
        return f"{self.reference.view}__{self.feature.name}" if full else self.feature.name


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, compiled. `plan` has inputs of the features' own types, so that nothing is rounded."""

    wanted: tuple[Wanted, ...]
    plan: Plan

    @property
    def entities(self) -> dict[str, Entity]:
        """Whose rows are read."""
        return {one.view.entity.type: one.view.entity for one in self.wanted}


class Questions:
    """Compiles questions against the newest plans, each once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Question] = {}
        self._of: Plans | None = None

    def get(self, request: Any, plans: Plans) -> Question:
        """Return what a request asks. Raises NotFound (FEATURE_SET_NOT_FOUND, FEATURE_NOT_FOUND), InvalidArgument, FailedPrecondition
        (FEAST_UNSUPPORTED)."""
        if self._of is not plans:
            self._known, self._of = {}, plans
        names = _names(request, plans)
        question = self._known.get(names)
        if question is None:
            question = _compiled(names, plans)
            if len(self._known) < _MAX_PLANS:
                self._known[names] = question
        return question


def _names(request: Any, plans: Plans) -> tuple[str, ...]:
    if request.WhichOneof("kind") == "features":
        return tuple(request.features.val)
    sets = plans.snapshot.feature_sets
    found = sets.get(request.feature_service)
    if found is None:
        hint = suggestion(request.feature_service, list(sets))
        raise NotFound(
            f"no feature set {request.feature_service[:80]!r}{hint}: a feature service is one here", reason="FEATURE_SET_NOT_FOUND"
        )
    return tuple(dict.fromkeys(name for item in found.inputs for name in item.features))


def _compiled(names: Sequence[str], plans: Plans) -> Question:
    if not 1 <= len(names) <= _MAX_FEATURES:
        raise InvalidArgument(f"{len(names)} features are asked for; ask for 1 to {_MAX_FEATURES}")
    wanted = tuple(_wanted(name, plans) for name in dict.fromkeys(names))
    inputs: dict[tuple[str, str], list[str]] = {}
    for one in wanted:
        dtype = "float32" if one.feature.scale else _AS_TENSOR.get(one.feature.dtype, one.feature.dtype)
        inputs.setdefault((one.view.entity.type, dtype), []).append(str(one.reference))
    made = FeatureSet(
        name=_SET,
        inputs=tuple(
            ModelInput(name=f"{entity}-{dtype}", entity=entity, features=tuple(features), dtype=dtype)  # type: ignore[arg-type]
            for (entity, dtype), features in inputs.items()
        ),
    )
    snapshot = dataclasses.replace(plans.snapshot, feature_sets={_SET: made})
    return Question(wanted, compile_plan(snapshot, _SET))


def _wanted(name: str, plans: Plans) -> Wanted:
    reference = parse(name)
    if reference is None:
        raise InvalidArgument(f"{name[:80]!r} is not view:feature")
    if reference.kind != "stored":
        message = f"{name[:160]!r} is not stored, and Feast's API has no place for what it needs: call GetFeatures"
        raise FailedPrecondition(message, reason="FEAST_UNSUPPORTED")
    view = plans.snapshot.feature_views.get(reference.view)
    view = None if view is None else view.at(reference.version)
    feature = None if view is None else next((f for f in view.features if f.name == reference.feature), None)
    if view is None or feature is None:
        raise NotFound(f"there is no feature {name[:160]!r}: see 'plait get featureview'", reason="FEATURE_NOT_FOUND")
    return Wanted(reference, view, feature)


def asked_rows(request: Any, question: Question) -> tuple[pb.GetFeaturesRequest, int]:
    """Return the rows a request wants in our terms, and how many. Raises InvalidArgument."""
    columns: dict[str, Sequence[Any]] = {name: _column(name, repeated) for name, repeated in request.entities.items()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgument("the entities' columns must be of one length, and not empty")
    ours = pb.GetFeaturesRequest()
    for entity in question.entities.values():
        rows = ours.entities.add(entity_type=entity.type)
        parts = [_part(columns, names, entity, alone=len(columns) == 1) for names in _join_keys(entity, question)]
        _fill(rows.ids, entity, parts)
    return ours, lengths.pop()


def _join_keys(entity: Entity, question: Question) -> list[tuple[str, ...]]:
    """Return by what names each part of an entity's key may be given."""
    if entity.key == "composite":
        return [(part.name,) for part in entity.parts]
    feast = next((one.view.feast for one in question.wanted if one.view.feast and one.view.entity.type == entity.type), None)
    return [(*(feast.join_keys if feast else ()), entity.type, f"{entity.type}_id")]


def _part(columns: Columns, names: Sequence[str], entity: Entity, *, alone: bool) -> Sequence[Any]:
    for name in names:
        if name in columns:
            return columns[name]
    if alone and entity.key != "composite":  # whatever the caller calls it, there is nothing else it can be
        return next(iter(columns.values()))
    raise InvalidArgument(f"ids of {entity.type!r} are missing: give them as {' or '.join(map(repr, names))}")


def _column(name: str, repeated: Any) -> Sequence[Any]:
    kinds = [value.WhichOneof("val") for value in repeated.val]
    if any(kind not in _VALUES for kind in kinds):
        raise InvalidArgument(f"{name[:80]!r}: an id is a string or an integer")
    return [getattr(value, kind) for value, kind in zip(repeated.val, kinds, strict=True)]


def _fill(ids: Any, entity: Entity, parts: Sequence[Sequence[Any]]) -> None:
    types: list[str] = [part.type for part in entity.parts] or [entity.key]
    for values, wanted in zip(parts, types, strict=True):
        if any(type(value) is not (str if wanted == "string" else int) for value in values):
            raise InvalidArgument(f"ids of {entity.type!r} are not of the declared type, {wanted}")
    if entity.key == "composite":
        for key in zip(*parts, strict=True):
            made = ids.composite_ids.add()
            for value in key:
                made.parts.add(**{"string_part" if isinstance(value, str) else "int64_part": value})
    else:
        (ids.string_ids if entity.key == "string" else ids.int64_ids).extend(parts[0])
