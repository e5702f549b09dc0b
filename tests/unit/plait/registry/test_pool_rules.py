from __future__ import annotations

import pytest

from plait.registry import rules
from plait.registry.findings import Steps
from plait.registry.policies import KubernetesService, PoolEndpoint
from plait.registry.records import Pool


def findings(pool: Pool) -> dict[Steps, str]:
    return dict(rules.check(pool))


@pytest.mark.parametrize(
    "pool",
    [
        Pool(name="p", endpoints=(PoolEndpoint(address="a.example:80", zone="z"), PoolEndpoint(address="[::1]:8001"))),
        Pool(name="p", protocol="oip", kubernetes=KubernetesService(namespace="ml", service="triton")),
    ],
)
def test_somewhere_to_call_is_enough(pool: Pool) -> None:
    assert findings(pool) == {}


@pytest.mark.parametrize("address", ["", "host", "host:0", "host:70000", "http://host:80", ":80", "ho st:80"])
def test_an_address_is_host_and_port(address: str) -> None:
    found = findings(Pool(name="p", endpoints=(PoolEndpoint(address=address),)))
    assert "expected host:port" in found["endpoints", 0, "address"]


def test_where_the_workers_are_is_said_once() -> None:
    service, endpoint = KubernetesService(namespace="Ml", service="s"), PoolEndpoint(address="a:1")
    assert ("endpoints",) in findings(Pool(name="p"))
    found = findings(Pool(name="p", endpoints=(endpoint, endpoint), kubernetes=service))
    assert found.keys() == {("endpoints",), ("endpoints", 1, "address"), ("kubernetes", "namespace")}


def test_the_routers_own_pool_is_not_in_the_registry() -> None:
    assert "choose another name" in findings(Pool(name="default", endpoints=(PoolEndpoint(address="a:1"),)))[()]
