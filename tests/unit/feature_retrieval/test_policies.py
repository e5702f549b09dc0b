"""Policies and shares; that they see the right counts is tested with the page."""

from __future__ import annotations

import math

import pytest

from feature_retrieval.policies import STATUSES, check, enforce
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, PlaitError, Unavailable

_FAIL, _DEFAULT, _STALE_OK = types_pb2.MISSING_POLICY_FAIL, types_pb2.MISSING_POLICY_DEFAULT, types_pb2.MISSING_POLICY_STALE_OK


def counts(**by_status: int) -> list[int]:
    found = [0] * STATUSES
    for name, count in by_status.items():
        found[types_pb2.RowStatus.Value(f"ROW_STATUS_{name.upper()}")] = count
    return found


@pytest.mark.parametrize(
    ("policy", "share", "cells_share", "found", "cells", "refused"),
    [
        (_FAIL, 0, 0, counts(present=3, null=1), (1, 8), None),
        (_FAIL, 0, 0, counts(present=3, stale=1), (0, 8), FailedPrecondition),
        (_DEFAULT, 0, 0, counts(defaulted=4), (8, 8), None),
        (_DEFAULT, 0.25, 0, counts(present=3, defaulted=1), (2, 8), None),
        (_DEFAULT, 0.24, 0, counts(present=3, defaulted=1), (2, 8), FailedPrecondition),
        (_STALE_OK, 0.1, 0, counts(stale=4), (0, 8), None),
        (_DEFAULT, 0, 0.25, counts(present=4), (2, 8), None),
        (_DEFAULT, 0, 0.25, counts(null=4), (3, 8), FailedPrecondition),
        (_FAIL, 0, 0.25, counts(null=4), (3, 8), FailedPrecondition),
        (_STALE_OK, 1, 0.25, counts(timed_out=2, present=2), (4, 8), DeadlineExceeded),
        (_DEFAULT, 0, 0.25, counts(unavailable=1, timed_out=1, present=2), (4, 8), Unavailable),
        (_DEFAULT, 1, 1, counts(not_found=4), (8, 8), None),
        (_DEFAULT, 0.1, 0.1, counts(), (0, 0), None),
    ],
)
def test_enforce(
    policy: int, share: float, cells_share: float, found: list[int], cells: tuple[int, int], refused: type[PlaitError] | None
) -> None:
    request = pb.GetFeaturesRequest(policy=policy, max_defaulted_share=share, max_defaulted_cells=cells_share)  # type: ignore[arg-type]
    if refused is None:
        enforce(request, found, *cells)
        return
    with pytest.raises(refused) as caught:
        enforce(request, found, *cells)
    assert (
        "present" in caught.value.message or "3 of 8 cells hold a default" in caught.value.message or "4 of 8 cells" in caught.value.message
    )


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["max_defaulted_share", "max_defaulted_cells"])
def test_a_share_that_is_none_is_refused(field: str, share: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(pb.GetFeaturesRequest(**{field: share}))  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_policy_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(pb.GetFeaturesRequest(policy=17, max_defaulted_share=2))  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == ["max_defaulted_share", "policy"]
    for policy in types_pb2.MissingPolicy.values():
        check(pb.GetFeaturesRequest(policy=policy, max_defaulted_share=1, max_defaulted_cells=1))


@pytest.mark.parametrize("share", [0.07, 0.29, 0.57, 0.58, 0.7])
def test_a_share_that_is_met_exactly_is_met(share: float) -> None:
    bad = round(share * 100)
    enforce(pb.GetFeaturesRequest(max_defaulted_cells=share), counts(null=100), bad, 100)
    with pytest.raises(FailedPrecondition):
        enforce(pb.GetFeaturesRequest(max_defaulted_cells=share), counts(null=100), bad + 1, 100)
