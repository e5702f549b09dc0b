"""Where transforms meet a request: their operands, gathered or sent along, in; columns of its tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from feature_retrieval.request_features import Sent
from feature_retrieval.transforms import settle
from feature_retrieval.views import Plan, TransformPlan
from plait.errors import InvalidArgument, Violation

Tensor = npt.NDArray[Any]


def check_rows(plan: Plan, rows: Mapping[str, int]) -> None:
    """Raise InvalidArgument (CROSS_NEEDS_ONE_ROW) where a transform takes one row of another entity type and the request has several."""
    crossed = {
        (t.transform.name, o.entity_type) for t in plan.transforms for o in t.operands if o.entity_type not in ("", t.transform.entity)
    }
    problems = [
        Violation("entities", f"transform {name!r} takes one {entity_type!r} per request, and {rows[entity_type]} are given")
        for name, entity_type in sorted(crossed)
        if rows.get(entity_type, 1) != 1
    ]
    if problems:
        raise InvalidArgument("a transform crosses entity types row by row", reason="CROSS_NEEDS_ONE_ROW", violations=problems)


def compute(plan: Plan, sent: Sent, tensors: Sequence[Tensor], now_us: int) -> int:
    """Fill the columns of every transform in the tensors [caller's rows, columns]; return how many of their cells hold a default."""
    defaulted = 0
    for planned in plan.transforms:
        values = planned.compiled(operands_of(planned, sent, tensors), now_us)
        for at, first, behind in planned.places:
            defaulted += settle(values, planned.transform.default, tensors[at][:, first:behind])
    return defaulted


def operands_of(planned: TransformPlan, sent: Sent, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what a transform reads, [rows, columns] each: what was gathered, or sent along ([1, 1] where that is one for the request)."""
    return [tensors[o.tensor] if o.tensor >= 0 else sent.values[o.request].reshape(-1, 1) for o in planned.operands]
