"""Buckets never give more than their rate and burst, and quotas tell what is used up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import QuotaViolation, ResourceExhausted
from plait.registry.policies import Quota
from plait.registry.records import Snapshot, Tenant
from router.quotas import Bucket, Quotas


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def quotas(**quota: float) -> tuple[Quotas, Clock]:
    clock = Clock()
    made = Quotas(clock)
    made.adopt(Snapshot(revision=1, tenants={"shop": Tenant(name="shop", quota=Quota(**quota)), "free": Tenant(name="free")}))  # type: ignore[arg-type]
    return made, clock


def refusal(made: Quotas, rows: int | None = None) -> ResourceExhausted:
    tenant = made.of["shop"]
    with pytest.raises(ResourceExhausted) as caught:
        _ = tenant.request() if rows is None else tenant.begin(rows)  # type: ignore[func-returns-value]
    assert caught.value.reason == "QUOTA_EXCEEDED"
    return caught.value


@given(
    st.floats(0.1, 1000),
    st.floats(1, 100),
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 50), st.floats(0.01, 2)), min_size=1, max_size=60),
)
def test_over_any_time_no_more_is_given_than_rate_and_burst(rate: float, burst: float, steps: list[tuple[float, float, float]]) -> None:
    now_s = 0.0
    bucket = Bucket(rate, burst, now_s)
    given_: list[tuple[float, float]] = []
    most_rate = rate
    for passed_s, count, factor in steps:
        now_s += passed_s
        wait_s = bucket.take(count, now_s)
        if wait_s:
            assert bucket.take(count, now_s + wait_s * 0.99 - 1e-6) > 0
            assert bucket.take(count, now_s + wait_s + 1e-6) == 0
            now_s += wait_s + 1e-6
        given_.append((now_s, count))
        bucket.resize(rate * factor, burst, now_s)
        most_rate = max(most_rate, rate * factor)
    for start in range(len(given_)):
        for end in range(start, len(given_)):
            taken = sum(count for _, count in given_[start : end + 1])
            most = most_rate * (given_[end][0] - given_[start][0]) + burst
            assert taken <= most + max(0, given_[end][1] - burst) + 1e-3  # (the last may owe what is more than the burst)


def test_requests_are_counted_and_come_back_with_time() -> None:
    made, clock = quotas(requests_per_s=10, burst=3)
    for _ in range(3):
        made.of["shop"].request()
    error = refusal(made)
    assert error.retry_after_s == pytest.approx(0.1)
    assert error.quota == (QuotaViolation("tenant:shop", "10 requests a second, 3 at once"),)
    assert error.message == (
        "the tenant's quota is used up: 10 requests a second, 3 at once; retry in 100 ms, or have the tenant's quota raised"
    )
    clock.now_s += 0.1
    made.of["shop"].request()
    refusal(made)
    clock.now_s += 60
    for _ in range(3):
        made.of["shop"].request()
    refusal(made)


def test_without_a_burst_a_seconds_worth_comes_at_once() -> None:
    made, _ = quotas(requests_per_s=5)
    for _ in range(5):
        made.of["shop"].request()
    refusal(made)


def test_less_than_one_request_a_second_is_a_quota_too() -> None:
    made, clock = quotas(requests_per_s=0.01)
    made.of["shop"].request()
    assert refusal(made).retry_after_s == 60.0
    clock.now_s += 100
    made.of["shop"].request()


def test_rows_are_counted_and_more_than_a_second_of_them_is_owed() -> None:
    made, clock = quotas(rows_per_s=100)
    made.of["shop"].begin(250)
    error = refusal(made, 1)
    assert error.retry_after_s == pytest.approx(1.51)
    assert [violation.description for violation in error.quota] == ["100 rows a second"]
    clock.now_s += 1.52
    made.of["shop"].begin(1)


def test_requests_at_once_are_counted_until_they_end() -> None:
    made, _ = quotas(in_flight=2)
    made.of["shop"].begin(1)
    made.of["shop"].begin(1)
    assert [violation.description for violation in refusal(made, 1).quota] == ["2 requests under way at once"]
    made.of["shop"].end()
    made.of["shop"].begin(1)
    assert repr(made.of["shop"]) == "<TenantQuota shop in_flight=2>"


def test_rows_that_are_refused_are_not_under_way() -> None:
    made, _ = quotas(in_flight=5, rows_per_s=1)
    made.of["shop"].begin(1)
    refusal(made, 1)
    assert repr(made.of["shop"]) == "<TenantQuota shop in_flight=1>"


def test_who_has_no_quota_is_not_counted_and_an_unchanged_quota_goes_on() -> None:
    made, _ = quotas(in_flight=5)
    assert set(made.of) == {"shop"}
    before = made.of["shop"]
    tenants = {"shop": Tenant(name="shop", quota=Quota(in_flight=5)), "new": Tenant(name="new", quota=Quota(rows_per_s=1))}
    made.adopt(Snapshot(revision=2, tenants=tenants))
    assert made.of["shop"] is before
    made.adopt(Snapshot(revision=3, tenants={"shop": Tenant(name="shop", quota=Quota(in_flight=6))}))
    assert made.of["shop"] is not before
    assert repr(made) == "<Quotas tenants=1>"
