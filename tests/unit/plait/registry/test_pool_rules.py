from __future__ import annotations

import pytest

from plait.registry import route_rules, rules
from plait.registry.findings import Steps
from plait.registry.policies import KubernetesService, PoolEndpoint
from plait.registry.records import Pool


def findings(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> dict[Steps, str]:
    monkeypatch.setattr(route_rules, "NOT_YET", frozenset())
    return dict(rules.check(pool))


@pytest.mark.parametrize(
    "pool",
    [
        Pool(name="p", endpoints=(PoolEndpoint(address="a.example:80", zone="z"), PoolEndpoint(address="[::1]:8001"))),
        Pool(name="p", protocol="oip", kubernetes=KubernetesService(namespace="ml", service="triton")),
    ],
)
def test_somewhere_to_call_is_enough(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(pool, monkeypatch) == {}


@pytest.mark.parametrize("address", ["", "host", "host:0", "host:70000", "http://host:80", ":80", "ho st:80"])
def test_an_address_is_host_and_port(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(Pool(name="p", endpoints=(PoolEndpoint(address=address),)), monkeypatch)
    assert "expected host:port" in found["endpoints", 0, "address"]


def test_where_the_workers_are_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    service, endpoint = KubernetesService(namespace="Ml", service="s"), PoolEndpoint(address="a:1")
    assert ("endpoints",) in findings(Pool(name="p"), monkeypatch)
    found = findings(Pool(name="p", endpoints=(endpoint, endpoint), kubernetes=service), monkeypatch)
    assert found.keys() == {("endpoints",), ("endpoints", 1, "address"), ("kubernetes", "namespace")}
