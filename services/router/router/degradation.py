"""Answers that are not the best possible: what stands in for features that cannot be had, and the words that say so.

The words are read off the reports of feature-retrieval; nothing is ever passed off as fresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition
from router.route_table import Input

_REASONS: Final = (
    (types_pb2.ROW_STATUS_DEFAULTED, "features_defaulted"),
    (types_pb2.ROW_STATUS_NOT_FOUND, "features_defaulted"),
    (types_pb2.ROW_STATUS_STALE, "features_stale"),
    (types_pb2.ROW_STATUS_TIMED_OUT, "features_timed_out"),
    (types_pb2.ROW_STATUS_UNAVAILABLE, "features_unavailable"),
)
SCORES_NOT_FINITE: Final = "scores_not_finite"
_STATUSES: Final = max(types_pb2.RowStatus.values()) + 1


def defaults(inputs: Sequence[Input], rows: Mapping[str, int], status: types_pb2.RowStatus.ValueType) -> pb.GetFeaturesResponse:
    """Return what feature-retrieval would answer if it could read nothing: defaults, and for each view that its rows are of `status`.

    `rows` says how many there are of each entity type, those that only transforms read included.
    """
    response = pb.GetFeaturesResponse()
    views: dict[str, str] = {}
    for item in inputs:
        count = rows[item.entity]
        response.tensors.add(name=item.name, dtype=item.number, shape=(count, *item.spec.shape[1:]), data=item.default_row * count)
        views.update(item.views)
    for view, entity in views.items():
        counts = [0] * _STATUSES
        counts[status] = rows[entity]
        response.views.add(feature_view=view, entity_type=entity, statuses=bytes((status,)) * rows[entity], status_counts=counts)
    return response


def reasons(views: Iterable[Any]) -> list[str]:
    """Return the stable words for what the `ViewReport`s tell, each once, always in the same order."""
    seen = [False] * _STATUSES
    for view in views:
        for status, count in enumerate(view.status_counts[:_STATUSES]):
            seen[status] |= count > 0
    return list(dict.fromkeys(word for status, word in _REASONS if seen[status]))


def require(views: Iterable[Any], required: AbstractSet[str]) -> None:
    """Raise FailedPrecondition (FEATURES_MISSING) where a row of a required view is not known: neither there nor null."""
    for view in views:
        if view.feature_view not in required:
            continue
        counts = [*view.status_counts, *([0] * _STATUSES)]
        known, rows = counts[types_pb2.ROW_STATUS_PRESENT] + counts[types_pb2.ROW_STATUS_NULL], len(view.statuses)
        if known < rows:
            raise FailedPrecondition(
                f"{rows - known} of {rows} rows of feature view {view.feature_view!r} are missing or too old, and the route requires it: "
                "write them, leave out the entities they are about, or take the view from required_views",
                reason="FEATURES_MISSING",
            )


def report(views: Iterable[Any], into: Any) -> None:
    """Append one `FeatureReport` per view: how many of its rows were found, and how."""
    for view in views:
        counts = [*view.status_counts, *([0] * _STATUSES)]
        into.add(
            feature_view=view.feature_view,
            rows=len(view.statuses),
            present=counts[types_pb2.ROW_STATUS_PRESENT],
            null=counts[types_pb2.ROW_STATUS_NULL],
            defaulted=counts[types_pb2.ROW_STATUS_DEFAULTED],
            not_found=counts[types_pb2.ROW_STATUS_NOT_FOUND],
            stale=counts[types_pb2.ROW_STATUS_STALE],
            timed_out=counts[types_pb2.ROW_STATUS_TIMED_OUT],
            unavailable=counts[types_pb2.ROW_STATUS_UNAVAILABLE],
        )
