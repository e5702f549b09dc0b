"""Feast's entities, feature views and services as our records, and in words what has no equal here. Pure: JSON in, records out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from plait.registry.records import Entity, FeastSource, Feature, FeatureDType, FeatureSet, FeatureView, KeyPart, ModelInput

Dump = Mapping[str, Any]
KeyType = Literal["string", "int64"]

_DTYPES: Final[dict[str, FeatureDType]] = {
    "Bool": "bool",
    "Int32": "int32",
    "Int64": "int64",
    "Float32": "float32",
    "Float64": "float64",
    "String": "string",
    "UnixTimestamp": "timestamp",
}
_LIST: Final = re.compile(r"Array\((\w+)\)\Z")
_LISTED: Final = frozenset({"Bool", "Int32", "Int64", "Float32", "Float64"})
_KEYS: Final[dict[str, KeyType]] = {"String": "string", "Unknown": "string", "Int64": "int64", "Int32": "int64"}
_WIDE: Final = frozenset({"int64", "float64", "timestamp"})  # which float32 would round
_VECTORS: Final = "-vectors"
_MAX_NAME: Final = 63
_MAX_PARTS: Final = 8
_MAX_DESCRIPTION: Final = 4096
_MAX_WIDTH: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What Feast does not say. `in_place`: the views read Feast's Redis instead of being filled anew."""

    max_length: int = 32
    hash_buckets: int = 1 << 20
    in_place: bool = False


@dataclass(slots=True)
class Mapped:
    """`views` and `sets` are to be applied; `left_out`, a sentence each, is to be read; so is `transforms`, per feature set."""

    views: list[FeatureView] = field(default_factory=list)
    sets: list[FeatureSet] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    transforms: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a feature of Feast has gone."""

    view: FeatureView
    feature: Feature

    @property
    def reference(self) -> str:
        return f"{self.view.name}:{self.feature.name}"


class _Names:
    """Gives each of Feast's names one of ours: lower case, other characters as "-". Two that would meet are told apart by a number."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def of(self, theirs: str) -> str:
        if theirs not in self._given:
            plain = re.sub(r"[^a-z0-9._-]", "-", theirs.lower())[:_MAX_NAME].strip("._-") or "feature"
            taken, ours, number = set(self._given.values()), plain, 2
            while ours in taken:
                ours, number = f"{plain[: _MAX_NAME - 8]}-{number}", number + 1
            self._given[theirs] = ours
        return self._given[theirs]


def mapped(dump: Dump, options: Options) -> Mapped:
    """Return what a repository becomes."""
    return _Mapper(dump, options).all()


class _Mapper:
    def __init__(self, dump: Dump, options: Options) -> None:
        self._dump = dump
        self._options = options
        self._result = Mapped()
        self._view_names = _Names()
        self._entity_names = _Names()
        self._set_names = _Names()
        self._places: dict[str, dict[str, _Place]] = {}  # view → feature → where it has gone
        self._on_demand = {view["name"]: view for view in dump["on_demand"]}
        self._project = ""  # set where rows stay in Feast's Redis

    def all(self) -> Mapped:
        """Do it."""
        if self._options.in_place:
            self._project = self._project_in_place()
        for view in self._dump["views"]:
            self._places[view["name"]] = self._view(view)
        for service in self._dump["services"]:
            self._service(service)
        used = {view["name"] for service in self._dump["services"] for view in service["views"]}
        for name in self._on_demand:
            if name not in used:
                self._leave_out(f"on-demand view {name!r}: no feature service uses it")
        return self._result

    def _leave_out(self, sentence: str) -> None:
        self._result.left_out.append(sentence)

    def _project_in_place(self) -> str:
        """Return the project whose rows can be read where they are, empty where they cannot."""
        dump, why = self._dump, ""
        if dump["online_store"] != "redis":
            why = f"its online store is {dump['online_store'] or 'not known'!r}, and only redis can be read"
        elif dump["entity_key_serialization_version"] != 3:
            why = f"its keys are of serialization version {dump['entity_key_serialization_version']}, and only 3 can be read"
        elif dump["versioned"]:
            why = "its online views are versioned, which changes their names in Redis"
        if why:
            self._leave_out(f"reading Feast's rows in place: {why}; the views are made to be filled anew")
        return "" if why else str(dump["project"])

    def _view(self, view: Dump) -> dict[str, _Place]:
        """Add one view, or two where it mixes vectors with other features; return where each of its features is."""
        theirs = f"{view['kind']} {view['name']!r}"
        entity, problem = self._entity(view["keys"])
        if view["kind"] == "LabelView":
            problem = "it holds labels for training, not features"
        elif not view["online"]:
            problem = "it is offline only"
        if entity is None or problem:
            self._leave_out(f"{theirs}: {problem}")
            return {}
        source = self._source(view, theirs)
        features = self._features(view, theirs, in_place=source is not None)
        vectors = [made for made in features.values() if made.width]
        others = [made for made in features.values() if not made.width]
        found: list[FeatureView] = []
        if others:
            found.append(_record(view, self._view_names.of(view["name"]), entity, others, source))
        if vectors:  # vectors live in a view of their own
            name = self._view_names.of(view["name"] + (_VECTORS if others else ""))
            found.append(_record(view, name, entity, vectors, source))
        if not found:
            self._leave_out(f"{theirs}: none of its features can be held")
        self._result.views += found
        of = {feature.name: record for record in found for feature in record.features}
        return {their: _Place(of[made.name], made) for their, made in features.items()}

    def _features(self, view: Dump, theirs: str, *, in_place: bool) -> dict[str, Feature]:
        names = _Names()
        features: dict[str, Feature] = {}
        for one in view["features"]:
            made, problem = _feature(one, names.of(one["name"]), self._options)
            if made is not None and in_place and made.name != one["name"]:
                made, problem = None, "its name cannot be one of ours, and rows read in place are found by it"
            if made is None:
                self._leave_out(f"{theirs}, feature {one['name']!r} ({one['type']}): {problem}")
            else:
                features[one["name"]] = made
        return features

    def _entity(self, keys: Sequence[Dump]) -> tuple[Entity | None, str]:
        """Return whose rows they are, or why that cannot be said here; a key of several parts is a composite one, in Feast's order."""
        if not keys:
            return None, "it has no entity, so it has one row for everything: send such values along with the request"
        odd = [f"{key['name']} ({key['type']})" for key in keys if key["type"] not in _KEYS]
        if odd:
            return None, f"a key is a string or an integer, not {', '.join(odd)}"
        if len(keys) > _MAX_PARTS:
            return None, f"its key has {len(keys)} parts, at most {_MAX_PARTS} are allowed"
        if len(keys) == 1:
            return Entity(type=self._entity_names.of(keys[0]["entity"]), key=_KEYS[keys[0]["type"]]), ""
        ordered = sorted(keys, key=lambda key: str(key["name"]))
        names = _Names()
        parts = tuple(KeyPart(name=names.of(key["name"]), type=_KEYS[key["type"]]) for key in ordered)
        return Entity(type=self._entity_names.of("+".join(key["entity"] for key in ordered)), key="composite", parts=parts), ""

    def _source(self, view: Dump, theirs: str) -> FeastSource | None:
        if not self._project:
            return None
        narrow = [key["name"] for key in view["keys"] if key["type"] == "Int32"]
        if narrow:
            self._leave_out(
                f"{theirs}, read in place: its key {narrow[0]!r} is an Int32, which Feast stores in fewer bytes than an id has here"
            )
            return None
        return FeastSource(project=self._project, view=view["name"], join_keys=tuple(sorted(key["name"] for key in view["keys"])))

    def _service(self, service: Dump) -> None:
        """Add the feature set of one service: one input per entity type, its columns in the service's order."""
        theirs, name = f"feature service {service['name']!r}", self._set_names.of(service["name"])
        columns: dict[str, list[_Place]] = {}
        for projection in service["views"]:
            view = projection["name"]
            if view in self._on_demand:
                self._result.transforms.setdefault(name, []).extend(self._suggestion(self._on_demand[view]))
                self._leave_out(f"{theirs}, on-demand view {view!r}: its Python is not taken over; the manifest says what to write instead")
            elif projection["join_key_map"]:
                self._leave_out(f"{theirs}, view {view!r}: it renames keys ({projection['join_key_map']}), which a feature set does not")
            else:
                for feature in projection["features"]:
                    place = self._places.get(view, {}).get(feature)
                    if place is None:
                        self._leave_out(f"{theirs}: {view}:{feature}, as above")
                    else:
                        columns.setdefault(place.view.entity.type, []).append(place)
        if not columns:
            self._leave_out(f"{theirs}: nothing of it is left")
            return
        inputs = tuple(_input(entity, found) for entity, found in columns.items())
        self._result.sets.append(FeatureSet(name=name, inputs=inputs, description=service["description"][:_MAX_DESCRIPTION]))

    def _suggestion(self, view: Dump) -> list[str]:
        """Return lines that say what a transform in place of an on-demand view needs; the code is theirs to translate."""
        operands = []
        for reference in view["inputs"]:
            source, _, feature = reference.partition(":")
            place = self._places.get(source, {}).get(feature)
            operands.append(f"{{{place.reference}}}" if place else f"{reference} (left out)")
        lines = [f"on-demand view {view['name']}: write each of its features as a transform, for example"]
        lines += [f"  transforms: [{{name: {one['name']}, entity: ..., expression: '...'}}]" for one in view["features"]]
        lines.append(f"  of what is stored: {', '.join(operands) or 'nothing'}")
        lines += [
            f"  of what is sent along, to be declared under request: {{$request:{one['name']}}} ({one['type']})" for one in view["request"]
        ]
        return lines + [f"  | {line}" for line in view["code"].rstrip().splitlines()]


def _record(view: Dump, name: str, entity: Entity, features: Sequence[Feature], source: FeastSource | None) -> FeatureView:
    ttl_s = float(view["ttl_s"])
    return FeatureView(
        name=name,
        entity=entity,
        features=tuple(features),
        max_age_s=ttl_s,
        retention_s=0.0 if source else 2 * ttl_s,  # a stale row must still be there to be called stale
        description=view["description"][:_MAX_DESCRIPTION],
        feast=source,
    )


def _feature(one: Dump, name: str, options: Options) -> tuple[Feature | None, str]:
    """Return our feature, or why there is none."""
    common: dict[str, Any] = {"name": name, "description": one["description"][:_MAX_DESCRIPTION]}
    if dtype := _DTYPES.get(one["type"]):
        if dtype != "string":
            return Feature(dtype=dtype, **common), ""
        words = tuple(word.strip() for word in one["tags"].get("vocabulary", "").split(",") if word.strip())
        return Feature(dtype="string", vocabulary=words, hash_buckets=0 if words else options.hash_buckets, **common), ""
    listed = _LIST.match(one["type"])
    if listed is None or listed[1] not in _LISTED:
        return None, "there is no such type here"
    dtype = _DTYPES[listed[1]]
    tagged = one["tags"].get("width", "")
    width = one["vector_length"] or (int(tagged) if tagged.isdecimal() else 0)
    if not width or listed[1] != "Float32":
        return Feature(dtype=dtype, max_length=options.max_length, **common), ""
    if width > _MAX_WIDTH:
        return None, f"a vector has at most {_MAX_WIDTH} values"
    return Feature(dtype=dtype, width=width, **common), ""


def _input(entity: str, columns: Sequence[_Place]) -> ModelInput:
    wide = any(place.feature.dtype in _WIDE for place in columns)
    references = tuple(dict.fromkeys(place.reference for place in columns))
    tensor = re.sub(r"\A(?=[^a-z])", "_", entity)  # the name of a tensor begins with a letter
    return ModelInput(name=tensor, entity=entity, features=references, dtype="float64" if wide else "float32")
