"""Identities of tenants: what is refused in a manifest, and what two tenants may not share."""

from __future__ import annotations

from typing import Any

import pytest

from plait.registry import identity_rules, rules
from plait.registry.policies import WorkloadIdentity
from plait.registry.records import Snapshot, Tenant

GOOD = "spiffe://cluster.local/ns/shop/sa/feed"


def tenant(*identities: Any, name: str = "shop") -> Tenant:
    return Tenant(name=name, identities=tuple(WorkloadIdentity(**{"roles": ("predict",), **given}) for given in identities))


@pytest.mark.parametrize(
    "identity",
    [
        {"spiffe": GOOD},
        {"spiffe": "spiffe://td/*"},
        {"spiffe": "spiffe://td/ns/a-*"},
        {"issuer": "https://i", "subject": "*"},
        {"issuer": "i", "subject": "s"},
    ],
)
def test_what_is_good(identity: dict[str, Any]) -> None:
    assert rules.check(tenant(identity)) == []


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({}, "give either spiffe, or issuer and subject"),
        ({"spiffe": GOOD, "issuer": "i", "subject": "s"}, "give either spiffe, or issuer and subject"),
        ({"issuer": "i"}, "give issuer and subject"),
        ({"subject": "s"}, "give issuer and subject"),
        ({"issuer": "i", "subject": "s" * 257}, "at most 256 bytes"),
        ({"spiffe": "*"}, "expected spiffe://"),
        ({"spiffe": "spiffe://*"}, "expected spiffe://"),
        ({"spiffe": "spiffe://td*"}, "expected spiffe://"),
        ({"spiffe": "spiffe://td/a*b"}, "expected spiffe://"),
        ({"spiffe": "spiffe://td/*/sa"}, "expected spiffe://"),
        ({"spiffe": "https://td/a"}, "expected spiffe://"),
        ({"spiffe": "spiffe://td/" + "a" * 250}, "expected spiffe://"),
        ({"spiffe": GOOD, "roles": ()}, "found none"),
        ({"spiffe": GOOD, "roles": ("root",)}, "found root"),
    ],
)
def test_what_is_refused(identity: dict[str, Any], told: str) -> None:
    assert told in " ".join(message for _, message in rules.check(tenant(identity)))


def test_nobody_is_listed_twice_or_belongs_to_two_but_any_subject_may() -> None:
    assert [message for _, message in rules.check(tenant({"spiffe": GOOD}, {"spiffe": GOOD}))] == ["is listed twice"]
    shared = ({"spiffe": GOOD}, {"issuer": "i", "subject": "s"}, {"issuer": "i", "subject": "*"})
    one, other = tenant(*shared), tenant(*shared, name="other")
    found = [*identity_rules.check_shared(one, Snapshot(tenants={"shop": one, "other": other}))]
    assert [steps for steps, _ in found] == [("identities", 0), ("identities", 1)]
    assert "belongs to tenant 'other'" in found[0][1]
