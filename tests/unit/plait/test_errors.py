"""Errors survive the wire with everything they say."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait import errors
from plait.errors import InvalidArgument, NotFound, PlaitError, QuotaViolation, ResourceExhausted, Violation, from_status

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, PlaitError) and cls is not PlaitError]


@pytest.mark.parametrize("cls", CLASSES)
def test_each_class_holds_its_own_code_and_comes_back_as_itself(cls: type[PlaitError]) -> None:
    error = cls("what to do next")
    status = error.to_status()
    again = from_status(status.code, status.message, status.SerializeToString())
    assert type(again) is cls
    assert (again.message, again.reason) == ("what to do next", cls.default_reason)


def test_codes_are_distinct() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES) == 13


@given(
    message=st.text(),
    reason=st.from_regex(r"[A-Z][A-Z_]{0,20}", fullmatch=True),
    violations=st.lists(st.builds(Violation, st.text(), st.text()), max_size=4),
    quota=st.lists(st.builds(QuotaViolation, st.text(), st.text()), max_size=2),
    retry=st.none() | st.floats(0, 3600),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_details_survive(
    message: str, reason: str, violations: list[Violation], quota: list[QuotaViolation], retry: float | None, metadata: dict[str, str]
) -> None:
    status = ResourceExhausted(
        message, reason=reason, violations=violations, quota=quota, retry_after_s=retry, metadata=metadata
    ).to_status()
    again = from_status(status.code, status.message, status.SerializeToString())
    assert (again.message, again.reason, list(again.violations), dict(again.metadata)) == (message, reason, violations, metadata)
    assert list(again.quota) == quota
    assert (again.retry_after_s is None) == (retry is None)
    if retry is not None:
        assert again.retry_after_s == pytest.approx(retry, abs=1e-6)


@pytest.mark.parametrize("details", [b"", b"\xff\xff\xff garbage", b"\x0a"])
def test_unreadable_details_are_ignored(details: bytes) -> None:
    error = from_status(grpc.StatusCode.NOT_FOUND.value[0], "gone", details)
    assert isinstance(error, NotFound)
    assert error.message == "gone"


def test_unknown_code_is_still_an_error_of_ours() -> None:
    assert type(from_status(15, "data loss")) is PlaitError


def test_text_lists_every_violation() -> None:
    error = InvalidArgument("2 problems", violations=[Violation("a", "is empty"), Violation("b.c", "is too long")])
    assert str(error) == "2 problems\n  a: is empty\n  b.c: is too long"
