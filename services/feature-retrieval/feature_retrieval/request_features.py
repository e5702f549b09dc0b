"""Features that callers send along: checked against their declaration, all violations at once, before anything is read for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.views import Plan
from plait.dtypes import BY_NAME, BY_NUMBER
from plait.errors import InvalidArgument, Violation
from plait.registry.explain import suggestion
from plait.registry.records import RequestFeature

Values = npt.NDArray[np.generic]
_NOTHING: Final[Mapping[str, Values]] = {}


@dataclass(frozen=True, slots=True)
class Sent:
    """The values by name, shape [] (one for every row) or [rows as the caller gave them]; which of them are declared defaults."""

    values: Mapping[str, Values]
    defaulted: frozenset[str] = frozenset()


_NONE: Final = Sent(_NOTHING)


def take(plan: Plan, tensors: Sequence[Any], rows: Mapping[str, int]) -> Sent:
    """Return the request features the plan uses. `rows`: how many ids were given of each entity type.

    Raises InvalidArgument (REQUEST_FEATURE_INVALID) with every violation: unknown, given twice, missing without a default, of another dtype
    or shape, not finite, out of the declared range.
    """
    if not tensors and not plan.request:
        return _NONE
    problems: list[Violation] = []
    declared = {feature.name: feature for feature in plan.feature_set.request}
    values: dict[str, Values] = {}
    seen: set[str] = set()
    for at, tensor in enumerate(tensors):
        feature = declared.get(tensor.name)
        if feature is None:
            known = f"it has {sorted(declared)}{suggestion(tensor.name, list(declared))}" if declared else "it has none"
            problems.append(
                Violation(f"request_features[{at}].name", f"feature set {plan.feature_set.name!r} declares no such one: {known}")
            )
            continue
        if tensor.name in seen:
            problems.append(Violation(f"request_features[{at}].name", f"{tensor.name!r} is given twice"))
            continue
        seen.add(tensor.name)
        try:
            values[tensor.name] = _checked(tensor, feature, rows.get(feature.entity))
        except ValueError as wrong:
            problems.append(Violation(f"request_features[{at}]", f"{tensor.name!r} {wrong}"))
    absent = [column.feature for column in plan.request if column.feature.name not in seen]
    for feature in absent:
        if feature.default is None:
            problems.append(Violation("request_features", f"{feature.name!r} is missing and has no default"))
        else:
            values[feature.name] = np.asarray(feature.default, BY_NAME[feature.dtype].numpy)
    if problems:
        raise InvalidArgument("the request features do not fit their declaration", reason="REQUEST_FEATURE_INVALID", violations=problems)
    return Sent(values, frozenset(feature.name for feature in absent))


def place(plan: Plan, sent: Sent, tensors: Sequence[npt.NDArray[Any]]) -> int:
    """Put the values into their columns of the tensors [caller's rows, columns]; return how many answered cells are declared defaults."""
    defaulted = 0
    for column in plan.request:
        values = sent.values[column.feature.name]
        for at, cells in column.cells.items():
            tensors[at][:, cells] = values if values.ndim == 0 else values[:, None]
            if at < plan.answered and column.feature.name in sent.defaulted:
                defaulted += len(tensors[at]) * len(cells)
    return defaulted


def _checked(tensor: Any, feature: RequestFeature, rows: int | None) -> Values:
    """Return the values of one tensor; raises ValueError with what is wrong, never with a value."""
    dtype = BY_NAME[feature.dtype]
    if tensor.dtype != dtype.number:
        given = BY_NUMBER.get(tensor.dtype)
        raise ValueError(f"is {given.name if given else 'of no known dtype'}, but declared as {dtype.name}")
    shape = tuple(tensor.shape)
    if feature.entity:
        if rows is not None and shape != (rows,):
            raise ValueError(f"has shape {list(shape)}, but needs one value per {feature.entity!r} of this request: [{rows}]")
        if len(shape) != 1 or shape[0] < 0:
            raise ValueError(f"has shape {list(shape)}, but needs one value per {feature.entity!r}")
    elif shape not in ((), (1,)):
        raise ValueError(f"has shape {list(shape)}, but takes one value per request: [] or [1]")
    count = shape[0] if shape else 1
    if len(tensor.data) != count * dtype.size_bytes:
        raise ValueError(f"has {len(tensor.data)} bytes of data, expected {count} x {dtype.size_bytes}")
    if dtype.name == "bool" and max(tensor.data, default=0) > 1:
        raise ValueError("has bytes other than 0 and 1, and is declared as bool")
    values: Values = np.frombuffer(tensor.data, dtype.numpy)
    _in_range(values, feature)
    return values if feature.entity else values[0]


def _in_range(values: npt.NDArray[Any], feature: RequestFeature) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("holds a value that is not a finite number")
    for bound, outside, word in ((feature.minimum, np.less, "below the minimum"), (feature.maximum, np.greater, "above the maximum")):
        if bound is not None and outside(values, bound).any():
            raise ValueError(f"holds a value {word} {bound:g}")


def describe(features: Iterable[RequestFeature], described: Any) -> None:
    """Add RequestFeatureDescriptions."""
    for feature in features:
        described.add(
            name=feature.name,
            dtype=BY_NAME[feature.dtype].number,
            entity_type=feature.entity,
            default_value=None if feature.default is None else float(feature.default),
            minimum=feature.minimum,
            maximum=feature.maximum,
            description=feature.description,
        )
