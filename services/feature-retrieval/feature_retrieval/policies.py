"""What a caller bears: the policy for rows that are not there, and the largest shares of rows and of cells that may be defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable, Violation

STATUSES: Final = len(types_pb2.RowStatus.keys())
_POLICIES: Final = frozenset(types_pb2.MissingPolicy.values())
_SLACK: Final = 1 + 1e-6  # shares are float32: 0.29 of 100 rows are 29 rows


def check(request: Any) -> None:
    """Raise InvalidArgument for a policy nobody knows and for shares outside 0 to 1: either would quietly allow everything."""
    wrong = [
        Violation(name, "must be 0 (no bound) to 1")
        for name in ("max_defaulted_share", "max_defaulted_cells")
        if not 0 <= getattr(request, name) <= 1  # NaN is not, either
    ]
    if request.policy not in _POLICIES:
        wrong.append(Violation("policy", f"is none of {sorted(types_pb2.MissingPolicy.keys())}"))
    if wrong:
        raise InvalidArgument("what the call bears is not as declared", violations=wrong)


def enforce(request: Any, counts: Sequence[int], defaulted_cells: int, cells: int) -> None:
    """Raise where an answer is worse than the request allows.

    `counts`: (row, view) pairs by status; `defaulted_cells` of all `cells` of the tensors hold a default in place of a value, nulls
    included. Raises Unavailable (STORE_UNAVAILABLE) or DeadlineExceeded where that is the reason, else FailedPrecondition (FEATURES_MISSING).
    """
    good = counts[types_pb2.ROW_STATUS_PRESENT] + counts[types_pb2.ROW_STATUS_NULL]
    if request.policy == types_pb2.MISSING_POLICY_STALE_OK:
        good += counts[types_pb2.ROW_STATUS_STALE]
    total = sum(counts)
    bad = total - good
    if bad and (request.policy == types_pb2.MISSING_POLICY_FAIL or _over(bad, request.max_defaulted_share, total)):
        raise _error(f"{bad} of {total} (row, view) pairs are not present, which the call's policy refuses", counts)
    if _over(defaulted_cells, request.max_defaulted_cells, cells):
        raise _error(f"{defaulted_cells} of {cells} cells hold a default in place of a value, more than the call allows", counts)


def _over(bad: int, share: float, total: int) -> bool:
    return 0 < share < bad / (total * _SLACK) if total else False


def _error(message: str, counts: Sequence[int]) -> Exception:
    found = {types_pb2.RowStatus.keys()[at].removeprefix("ROW_STATUS_").lower(): n for at, n in enumerate(counts) if n}
    message = f"{message}: {found}"
    if counts[types_pb2.ROW_STATUS_UNAVAILABLE]:
        return Unavailable(message, reason="STORE_UNAVAILABLE", retry_after_s=0.25)
    if counts[types_pb2.ROW_STATUS_TIMED_OUT]:
        return DeadlineExceeded(message)
    return FailedPrecondition(message, reason="FEATURES_MISSING")
