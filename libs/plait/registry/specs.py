"""Records ↔ plain data: the JSON kept in Postgres, in the last-known-good file and under `spec:` of a manifest.

Validation is pydantic's, strict and in JSON mode: a list is a tuple and 3 is a float, but "3" and true are neither. What people
write may hold no unknown field; what was stored may, because a newer version of us may have written it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar, cast, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from plait.errors import Internal
from plait.registry.records import Experiment, FeatureSet, FeatureView, Kind, Model, Pool, Record, Route, Tenant

CLASSES: Final[Mapping[Kind, type[Record]]] = MappingProxyType(
    {
        "Model": Model,
        "FeatureView": FeatureView,
        "FeatureSet": FeatureSet,
        "Route": Route,
        "Tenant": Tenant,
        "Experiment": Experiment,
        "Pool": Pool,
    }
)
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_STRICT: Final = ConfigDict(extra="forbid", strict=True)
_LENIENT: Final = ConfigDict(extra="ignore", strict=True)
_SCALARS: Final = (str, int, float)
_FILLED_IN: Final[Mapping[Kind, tuple[str, ...]]] = MappingProxyType({"FeatureView": ("schemas", "versions")})

T = TypeVar("T")


class Validator:
    """Turns plain data into one dataclass. A one-tuple around it is how pydantic lets a configuration reach a plain dataclass."""

    def __init__(self, cls: type[Any], *, forbid_unknown: bool) -> None:
        adapted: Any = tuple[cls]  # type: ignore[valid-type]
        self._adapter: TypeAdapter[tuple[Any]] = TypeAdapter(adapted, config=_STRICT if forbid_unknown else _LENIENT)
        self.cls = cls

    def __call__(self, data: Mapping[str, Any]) -> Any:
        """Return the dataclass. Raises pydantic's ValidationError, each location led by a 0."""
        (value,) = self._adapter.validate_json(json.dumps([data]))
        return freeze(value)


_STORED: Final = {kind: Validator(cls, forbid_unknown=False) for kind, cls in CLASSES.items()}


def kind_of(record: Record) -> Kind:
    """Return the kind a record is listed under."""
    return cast("Kind", type(record).__name__)


def filled_in(kind: Kind) -> tuple[str, ...]:
    """Return the fields of a kind that the store fills in, and that no manifest holds."""
    return _FILLED_IN.get(kind, ())


def to_stored(record: Record) -> dict[str, Any]:
    """Return every field but the name, as JSON types."""
    fields = cast("dict[str, Any]", to_plain(record))
    del fields["name"]
    return fields


def from_stored(kind: Kind, name: str, spec: Mapping[str, Any]) -> Record:
    """Return the record `to_stored` wrote. Unknown fields are passed over. Raises Internal on anything else wrong."""
    try:
        return cast("Record", _STORED[kind]({**spec, "name": name}))
    except ValidationError as error:
        raise Internal(
            f"the stored {kind} {name} cannot be read: {error.error_count()} fields are wrong", reason="REGISTRY_CORRUPT"
        ) from error


def to_spec(record: Record) -> dict[str, Any]:
    """Return what a person would write under `spec:`: no name, no defaults, nothing that the store fills in."""
    spec = cast("dict[str, Any]", to_plain(record, defaults=False))
    for name in ("name", *filled_in(kind_of(record))):
        spec.pop(name, None)
    return spec


def to_manifest(record: Record) -> dict[str, Any]:
    """Return the whole manifest of a record, so that what `get` prints can be applied again."""
    return {"apiVersion": "plait.dev/v1", "kind": kind_of(record), "metadata": {"name": record.name}, "spec": to_spec(record)}


def freeze(value: T) -> T:
    """Make the mappings inside a frozen record read-only too, in place; return it."""
    if isinstance(value, tuple):
        for item in value:
            freeze(item)
        return value
    for name, _ in _fields(cast("Hashable", type(value))):
        inner = getattr(value, name)
        if isinstance(inner, dict):
            for item in inner.values():
                freeze(item)
            object.__setattr__(value, name, MappingProxyType(inner))
        else:
            freeze(inner)
    return value


@functools.cache
def _fields(cls: Hashable) -> tuple[tuple[str, dataclasses.Field[Any]], ...]:
    """Return the fields of a dataclass by name, none of anything else; a view has thousands of values, so this is looked up once."""
    return tuple((f.name, f) for f in dataclasses.fields(cls)) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else ()


def to_plain(value: Any, *, defaults: bool = True) -> Any:
    """Return records and what they hold as JSON types; without `defaults`, fields at their default are left out."""
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, tuple | list):
        return [to_plain(item, defaults=defaults) for item in value]
    if isinstance(value, Mapping):
        return {name: to_plain(item, defaults=defaults) for name, item in value.items()}
    found = ((name, field, getattr(value, name)) for name, field in _fields(cast("Hashable", type(value))))
    return {name: to_plain(inner, defaults=defaults) for name, field, inner in found if defaults or not _is_default(field, inner)}


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default)
    return field.default_factory is not dataclasses.MISSING and bool(value == field.default_factory())
