"""Why an answer is not the best possible one, read off the reports of feature-retrieval; nothing is ever passed off as fresh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from plait.api.types.v1 import types_pb2

_REASONS: Final = (
    (types_pb2.ROW_STATUS_DEFAULTED, "features_defaulted"),
    (types_pb2.ROW_STATUS_NOT_FOUND, "features_defaulted"),
    (types_pb2.ROW_STATUS_STALE, "features_stale"),
    (types_pb2.ROW_STATUS_TIMED_OUT, "features_timed_out"),
    (types_pb2.ROW_STATUS_UNAVAILABLE, "features_unavailable"),
)
SCORES_NOT_FINITE: Final = "scores_not_finite"
_STATUSES: Final = max(types_pb2.RowStatus.values()) + 1


def reasons(views: Iterable[Any]) -> list[str]:
    """Return the stable words for what the `ViewReport`s tell, each once, always in the same order."""
    seen = [False] * _STATUSES
    for view in views:
        for status, count in enumerate(view.status_counts[:_STATUSES]):
            seen[status] |= count > 0
    return list(dict.fromkeys(word for status, word in _REASONS if seen[status]))


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
