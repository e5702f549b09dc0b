"""What a request must satisfy, checked before any work: every violation is found and told at once.

Lists of ids are looked at with calls that run in C; nothing here loops over them in Python unless something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NUMBER
from plait.errors import InvalidArgument, Violation
from plait.registry.entity_ids import Id, IdPart, misfit
from plait.registry.entity_ids import composites as read_composites
from plait.registry.records import Entity
from router.route_table import Arm, Input, ServingRoute

MAX_ROWS: Final = 10_000
MAX_ID_BYTES: Final = 256  # of a text, also as a part of a composite key
MAX_PARTS: Final = 8
MAX_NAME_BYTES: Final = 63
MAX_REQUEST_ID_BYTES: Final = 128
MAX_LABELS: Final = 16
MAX_LABEL_BYTES: Final = 256
MAX_DIMENSIONS: Final = 8
MAX_INVALIDATED: Final = 1000  # items, in one call
_MAX_TOLD: Final = 20  # violations travel in a trailer of a few KiB
_MAX_UTF8: Final = 4  # bytes per character

Ids = Sequence[str] | Sequence[int] | Sequence[tuple[IdPart, ...]]


class Findings:
    """Collects violations; tells at most 20 of them and how many more there are."""

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._more = 0

    def add(self, field: str, description: str) -> None:
        """Note one."""
        if len(self._found) < _MAX_TOLD:
            self._found.append(Violation(field, description))
        else:
            self._more += 1

    def __len__(self) -> int:
        return len(self._found) + self._more

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with all of them, if there are any."""
        if not self._found:
            return
        more = [Violation("", f"and {self._more} more")] if self._more else []
        first = self._found[0]
        others = len(self._found) + self._more - 1
        summary = f"{first.field}: {first.description}" + (f" (and {others} more, see the details)" if others else "")
        raise InvalidArgument(summary, violations=[*self._found, *more])


def check_rank(request: pb.RankRequest, found: Findings) -> tuple[Id, Ids]:
    """Note what is wrong with a Rank whatever its route; return subject and candidates as Python values.

    Raises at once, with everything found, where no route is named: there is nothing more to find then.
    """
    given = count(request.candidates)
    candidates = _ids(request.candidates, "candidates", found, distinct=True) if given else ()  # (a route may retrieve them)
    subject = _ids(request.subject, "subject", found)
    if len(subject) > 1:
        found.add("subject", f"expected exactly one id, got {len(subject)}")
    if request.top_k < 0:
        found.add("top_k", f"expected 0 (all) or more, got {request.top_k}")
    _check_common(request, found)
    return (subject[0] if subject else ""), candidates


def check_rank_fits(request: pb.RankRequest, route: ServingRoute, arm: Arm, candidates: Ids, found: Findings) -> None:
    """Note what is wrong with a Rank on this route: kinds of ids, the route's own limit, inline features."""
    _check_kind(request.subject, arm.keys.get(route.subject), "subject", found)
    if not count(request.candidates) and (route.stages is None or route.stages.retriever is None):
        found.add("candidates", "expected at least one id, got none")
    _check_kind(request.candidates, arm.keys.get(route.candidate), "candidates", found)
    if route.max_candidates < len(candidates) <= MAX_ROWS:
        found.add("candidates", f"expected at most {route.max_candidates} on this route, got {len(candidates)}")
    if request.inline_features:
        _check_inline(request.inline_features, arm, len(candidates), found)


def check_predict(request: pb.PredictRequest, found: Findings) -> Mapping[str, Ids]:
    """Note what is wrong with a Predict whatever its route; return the ids by entity type. Raises as `check_rank`."""
    rows: dict[str, Ids] = {}
    for index, entity in enumerate(request.entities):
        field = f"entities[{index}]"
        if not entity.entity_type or len(entity.entity_type.encode()) > MAX_NAME_BYTES:
            found.add(f"{field}.entity_type", f"expected a name of 1 to {MAX_NAME_BYTES} bytes")
        elif entity.entity_type in rows:
            found.add(f"{field}.entity_type", f"{entity.entity_type!r} is given twice; put all its ids into one message")
        rows.setdefault(entity.entity_type, _ids(entity.ids, f"{field}.ids", found))
    total = sum(map(len, rows.values()))
    if len(rows) > 1 and total > MAX_ROWS:
        found.add("entities", f"expected at most {MAX_ROWS} ids together, got {total}")
    _check_common(request, found)
    return rows


def check_predict_fits(request: pb.PredictRequest, route: ServingRoute, arm: Arm, rows: Mapping[str, Ids], found: Findings) -> None:
    """Note what is wrong with a Predict on this route: entity types, kinds of ids, row counts, inline features, outputs."""
    inline = {tensor.name for tensor in request.inline_features}
    for index, entity in enumerate(request.entities):
        if entity.entity_type not in arm.keys:
            known = ", ".join(sorted(arm.keys))
            found.add(f"entities[{index}].entity_type", f"the route's feature set does not use {entity.entity_type!r}; it uses {known}")
        else:
            _check_kind(entity.ids, arm.keys[entity.entity_type], f"entities[{index}].ids", found)
    _check_present(arm, rows, inline, found)
    if request.inline_features:
        _check_inline(request.inline_features, arm, _row_count(request, route, arm, rows), found)
    for index, name in enumerate(request.outputs):
        if name not in arm.outputs:
            found.add(f"outputs[{index}]", f"the model has no output {name[:MAX_NAME_BYTES]!r}; it has {', '.join(arm.outputs)}")
    if len(set(request.outputs)) < len(request.outputs):
        found.add("outputs", "an output is listed twice")


def _check_present(arm: Arm, rows: Mapping[str, Ids], inline: set[str], found: Findings) -> None:
    """Each input that is not given inline needs ids of its entity type, one where it is per request."""
    for item in arm.inputs:
        if item.name in inline:
            continue
        for entity in item.entities:
            if entity not in rows:
                found.add("entities", f"expected ids of {entity!r}, or input {item.name!r} inline")
            elif len(rows[entity]) > 1 and (entity != item.entity or not item.per_row):
                found.add("entities", f"expected exactly one id of {entity!r}, got {len(rows[entity])}")


def _row_count(request: pb.PredictRequest, route: ServingRoute, arm: Arm, rows: Mapping[str, Ids]) -> int:
    """The rows of a Predict: its candidates, or else what the first inline tensor that is per row holds, at least 1."""
    if route.candidate in rows:
        return len(rows[route.candidate])
    per_row = {item.name for item in arm.inputs if item.per_row}
    return max(1, next((tensor.shape[0] for tensor in request.inline_features if tensor.name in per_row and tensor.shape), 1))


def _check_common(request: pb.RankRequest | pb.PredictRequest, found: Findings) -> None:
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        found.add("request_id", f"expected at most {MAX_REQUEST_ID_BYTES} bytes, got {len(request.request_id.encode())}")
    if request.labels:
        _check_labels(request.labels, found)
    if not 0 < len(request.route.encode()) <= MAX_NAME_BYTES:
        found.add("route", f"expected the name of a route, 1 to {MAX_NAME_BYTES} bytes, got {len(request.route.encode())} bytes")
        found.raise_if_any()


def _check_labels(labels: Mapping[str, str], found: Findings) -> None:
    """Tells names only where they are fit to be told, and no values: they may be a person's."""
    if len(labels) > MAX_LABELS:
        found.add("labels", f"expected at most {MAX_LABELS}, got {len(labels)}")
        return
    for name, value in labels.items():
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            found.add("labels", f"expected names of 1 to {MAX_NAME_BYTES} bytes, got one of {len(name.encode())}")
        elif len(value.encode()) > MAX_LABEL_BYTES:
            found.add(f"labels[{name!r}]", f"expected at most {MAX_LABEL_BYTES} bytes, got {len(value.encode())}")


def count(ids: types_pb2.EntityIds) -> int:
    """Return how many ids there are."""
    return len(ids.string_ids) + len(ids.int64_ids) + len(ids.composite_ids)


def one_entity(rows: types_pb2.EntityRows) -> bool:
    """Say whether these rows are one id, well formed, of an entity type."""
    found = Findings()
    ids = _ids(rows.ids, "ids", found)
    return len(ids) == 1 and not found and 0 < len(rows.entity_type.encode()) <= MAX_NAME_BYTES


def _ids(ids: types_pb2.EntityIds, field: str, found: Findings, *, distinct: bool = False) -> Ids:
    """Return the ids as a list, with what is wrong with their number, kind, length or (where they must be `distinct`) repetition noted."""
    strings, integers, composites = len(ids.string_ids), len(ids.int64_ids), len(ids.composite_ids)
    total = strings + integers + composites
    if not total:
        found.add(field, "expected at least one id, got none")
    elif total > MAX_ROWS:
        found.add(field, f"expected at most {MAX_ROWS} ids, got {total}")
    elif (strings > 0) + (integers > 0) + (composites > 0) > 1:
        found.add(field, "expected ids of one kind, got several: fill one list only")
    elif composites:
        return _checked_composites(ids, field, found, distinct=distinct)
    else:
        return _checked(ids, field, found, distinct=distinct)
    return ()


def _checked(ids: types_pb2.EntityIds, field: str, found: Findings, *, distinct: bool) -> Ids:
    names: Sequence[str] = ids.string_ids[:]
    values: Ids = names or ids.int64_ids[:]
    seen = set(values)
    if names and ("" in seen or max(map(len, names)) * _MAX_UTF8 > MAX_ID_BYTES):
        _tell_bad_ids(names, f"{field}.string_ids", found)
    if distinct and len(seen) < len(values):
        _tell_duplicates(values, field, found)
    return values


def _checked_composites(ids: types_pb2.EntityIds, field: str, found: Findings, *, distinct: bool) -> Ids:
    values = read_composites(ids)
    for index, parts in enumerate(values):
        if not 1 <= len(parts) <= MAX_PARTS:
            found.add(f"{field}.composite_ids[{index}]", f"expected 1 to {MAX_PARTS} parts, each a string_part or an int64_part")
        elif any(isinstance(part, str) and len(part) * _MAX_UTF8 > MAX_ID_BYTES < len(part.encode()) for part in parts):
            found.add(f"{field}.composite_ids[{index}]", f"expected at most {MAX_ID_BYTES} bytes in a part")
    if distinct and len(set(values)) < len(values):
        _tell_duplicates(values, field, found)
    return values


def _tell_bad_ids(names: Sequence[str], field: str, found: Findings) -> None:
    for index, name in enumerate(names):
        size = len(name.encode())
        if not 0 < size <= MAX_ID_BYTES:
            found.add(f"{field}[{index}]", f"expected 1 to {MAX_ID_BYTES} bytes, got {size}")


def _tell_duplicates(ids: Ids, field: str, found: Findings) -> None:
    """Names places, not ids: an id may be a person's."""
    seen: dict[object, int] = {}
    for index, value in enumerate(ids):
        first = seen.setdefault(value, index)
        if first != index:
            found.add(f"{field}[{index}]", f"the same id as {field}[{first}]; send each candidate once")


def _check_kind(ids: types_pb2.EntityIds, entity: Entity | None, field: str, found: Findings) -> None:
    if entity is None:
        return  # no view is read by these ids
    given = {"string": ids.string_ids, "int64": ids.int64_ids, "composite": ids.composite_ids}
    for kind, values in given.items():
        if values and kind != entity.key:
            found.add(field, f"ids of {entity.type!r} are {entity.key}, so send {entity.key}_ids; got {kind}_ids")
            return
    if entity.key == "composite" and (wrong := misfit(read_composites(ids), entity)):
        found.add(field, wrong)


def _check_inline(tensors: Iterable[types_pb2.Tensor], arm: Arm, rows: int, found: Findings) -> None:
    inputs = {item.name: item for item in arm.inputs}
    seen: set[str] = set()
    for index, tensor in enumerate(tensors):
        field = f"inline_features[{index}]"
        item = inputs.get(tensor.name)
        if item is None:
            found.add(f"{field}.name", f"the model has no input {tensor.name[:MAX_NAME_BYTES]!r}; it has {', '.join(inputs)}")
        elif tensor.name in seen:
            found.add(f"{field}.name", f"input {tensor.name!r} is given twice")
        else:
            _check_tensor(tensor, item, rows, field, found)
        seen.add(tensor.name)


def _check_tensor(tensor: types_pb2.Tensor, item: Input, rows: int, field: str, found: Findings) -> None:
    if tensor.dtype != item.number:
        got = BY_NUMBER[tensor.dtype].name if tensor.dtype in BY_NUMBER else f"number {tensor.dtype}"
        found.add(f"{field}.dtype", f"input {item.name!r} is {item.spec.dtype}, got {got}")
    expected = (rows if item.per_row else 1, *item.spec.shape[1:])
    shape = tensor.shape[:]
    if len(shape) != len(expected) or any(want not in (-1, have) for want, have in zip(expected, shape, strict=False)) or min(shape) < 0:
        found.add(f"{field}.shape", f"input {item.name!r} must be {_shown(expected)} here, got {_shown(shape)}")
    elif tensor.dtype == item.number and item.item_bytes and len(tensor.data) != math.prod(shape) * item.item_bytes:
        size = math.prod(shape) * item.item_bytes
        found.add(f"{field}.data", f"{_shown(shape)} of {item.spec.dtype} takes {size} bytes, got {len(tensor.data)}")


def _shown(shape: Sequence[Any]) -> str:
    more = ", …" if len(shape) > MAX_DIMENSIONS else ""
    return f"[{', '.join(map(str, shape[:MAX_DIMENSIONS]))}{more}]"


def check_invalidation(request: pb.InvalidateCacheRequest) -> Ids:
    """Return the items that a request names, if any. Raises InvalidArgument with everything that is wrong with it."""
    found = Findings()
    ids: Ids = ()
    for field, name in (("route", request.route), ("model", request.model), ("items.entity_type", request.items.entity_type)):
        if len(name.encode()) > MAX_NAME_BYTES:
            found.add(field, f"expected at most {MAX_NAME_BYTES} bytes, got {len(name.encode())}")
    if request.HasField("items"):
        ids = _ids(request.items.ids, "items.ids", found)
        if not request.items.entity_type:
            found.add("items.entity_type", "expected the entity type of the items")
        if len(ids) > MAX_INVALIDATED:
            found.add("items.ids", f"expected at most {MAX_INVALIDATED} ids, got {len(ids)}: send the rest in another call")
    elif not (request.route or request.model):
        found.add("", "expected a route, a model or items to forget")
    found.raise_if_any()
    return ids
