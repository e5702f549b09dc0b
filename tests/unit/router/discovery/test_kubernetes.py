"""EndpointSlices as they change, over a real HTTP API that also fails."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace as Is
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.kubernetes_api import KubernetesApi, endpoint, endpoint_slice
from tests.fakes.registry_world import eventually

from router.discovery.found import Found
from router.discovery.kubernetes import KubernetesDiscovery, endpoints


def at(host: str, **more: Any) -> Found:
    return Found(address=f"{host}:50053", **more)


class Watcher:
    """What discovery told last."""

    def __init__(self) -> None:
        self.found: frozenset[Found] | None = None
        self.times = 0
        self.news = 0

    def tell(self, found: frozenset[Found]) -> None:
        self.found = found
        self.times += 1

    def heard(self) -> None:
        self.news += 1


@asynccontextmanager
async def following(api: KubernetesApi, watch_s: int = 30) -> AsyncIterator[Watcher]:
    watcher = Watcher()
    discovery = KubernetesDiscovery("ml", "workers", "grpc", configure=api.configuration, on_news=watcher.heard, watch_s=watch_s)
    running = asyncio.create_task(discovery.run(watcher.tell))
    try:
        yield watcher
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_comes_goes_and_changes_is_told() -> None:
    async with KubernetesApi() as api, following(api) as watcher:
        await eventually(lambda: watcher.found == frozenset() and api.watching == 1)
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1"), endpoint("10.0.0.2")))
        await eventually(lambda: watcher.found == {at("10.0.0.1"), at("10.0.0.2")})
        await api.put(endpoint_slice("s2", endpoint("10.0.0.3", zone="b")))
        await eventually(lambda: watcher.found == {at("10.0.0.1"), at("10.0.0.2"), at("10.0.0.3", zone="b")})
        going = endpoint("10.0.0.2", ready=False, serving=True, terminating=True)
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1", ready=False), going))
        gone = {at("10.0.0.1", ready=False), at("10.0.0.2", ready=False, terminating=True), at("10.0.0.3", zone="b")}
        await eventually(lambda: watcher.found == gone)
        await api.delete("s1")
        await eventually(lambda: watcher.found == {at("10.0.0.3", zone="b")})
        assert api.lists == 1, "all of it was heard by watching"


async def test_slices_of_other_services_are_not_ours() -> None:
    async with KubernetesApi() as api, following(api) as watcher:
        await api.put(endpoint_slice("other", endpoint("10.0.9.9"), service="others"))
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
        await eventually(lambda: watcher.found == {at("10.0.0.1")})


async def test_what_is_the_same_is_not_told_again() -> None:
    async with KubernetesApi() as api, following(api) as watcher:
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
        await eventually(lambda: watcher.found == {at("10.0.0.1")})
        times, news = watcher.times, watcher.news
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
        await eventually(lambda: watcher.news > news)
        assert watcher.times == times


async def test_a_version_too_old_to_watch_from_is_listed_anew() -> None:
    async with KubernetesApi() as api:
        api.forgotten = 10_000
        async with following(api) as watcher:
            await eventually(lambda: api.lists > 2)
            await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
            await eventually(lambda: watcher.found == {at("10.0.0.1")})
            api.forgotten = 0
            await eventually(lambda: api.watching == 1)


async def test_a_watch_that_ends_is_begun_anew_and_misses_nothing() -> None:
    async with KubernetesApi() as api, following(api) as watcher:
        await eventually(lambda: api.watching == 1)
        await api.cut()
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
        await eventually(lambda: watcher.found == {at("10.0.0.1")})


async def test_a_watch_without_news_is_listed_again_after_its_time() -> None:
    async with KubernetesApi() as api, following(api, watch_s=1):
        await eventually(lambda: api.lists > 1)


async def test_while_the_api_refuses_nothing_is_forgotten() -> None:
    async with KubernetesApi() as api, following(api) as watcher:
        await api.put(endpoint_slice("s1", endpoint("10.0.0.1")))
        await eventually(lambda: watcher.found == {at("10.0.0.1")})
        api.status = 503
        await api.cut()
        await eventually(lambda: api.watching == 0)
        await api.put(endpoint_slice("s1", endpoint("10.0.0.2")))
        assert watcher.found == {at("10.0.0.1")}
        api.status = 200
        await eventually(lambda: watcher.found == {at("10.0.0.2")})


async def test_an_api_that_is_away_is_found_when_it_comes_back() -> None:
    async with KubernetesApi() as api:
        port = api.port
    async with following(api) as watcher:
        await asyncio.sleep(0)
        assert watcher.found is None
        again = KubernetesApi()
        again.port = port
        async with again:
            await again.put(endpoint_slice("s1", endpoint("10.0.0.1")))
            await eventually(lambda: watcher.found == {at("10.0.0.1")})


async def test_without_the_package_it_says_what_to_install_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.aio", None)
    running = asyncio.create_task(KubernetesDiscovery("ml", "workers", "grpc").run(lambda _: pytest.fail("it knows of none")))
    told = ""
    while "plait-router[kubernetes]" not in told:
        await asyncio.sleep(0)
        told += capsys.readouterr().out
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# ---- slices → endpoints, without an API


GRPC = (Is(name="grpc", port=50053),)


def one(*listed: Any, name: str = "s", family: str = "IPv4", ports: Any = GRPC) -> Any:
    return Is(metadata=Is(name=name), address_type=family, ports=ports, endpoints=listed)


def pod(host: str, uid: str | None = None, ready: bool | None = True, terminating: bool | None = None) -> Any:
    reference = Is(uid=uid) if uid else None
    return Is(addresses=[host], target_ref=reference, zone=None, conditions=Is(ready=ready, terminating=terminating))


def test_a_pod_with_addresses_of_both_families_is_one_endpoint() -> None:
    slices = [one(pod("fd00::1", "u1"), pod("fd00::2", "u2"), name="v6", family="IPv6"), one(pod("10.0.0.1", "u1"), name="v4")]
    assert endpoints(slices, "grpc") == {at("10.0.0.1"), Found(address="[fd00::2]:50053")}


def test_an_endpoint_in_two_slices_is_ready_if_it_is_in_one() -> None:
    slices = [one(pod("10.0.0.1", "u1", ready=False), name="a"), one(pod("10.0.0.1", "u1"), name="b")]
    assert endpoints(slices, "grpc") == endpoints(slices[::-1], "grpc") == {at("10.0.0.1")}


@pytest.mark.parametrize(
    ("given_slice", "expected"),
    [
        (one(pod("10.0.0.1", ready=None)), {at("10.0.0.1")}),
        (one(Is(addresses=["10.0.0.1"], target_ref=None, zone=None, conditions=None)), {at("10.0.0.1")}),
        (one(pod("10.0.0.1"), ports=None), set()),
        (one(pod("10.0.0.1"), ports=[Is(name="http", port=80)]), set()),
        (one(pod("workers.example.com"), family="FQDN"), set()),
        (Is(metadata=Is(name="s"), address_type="IPv4", ports=[Is(name="grpc", port=1)], endpoints=None), set()),
    ],
)
def test_what_the_api_leaves_out(given_slice: Any, expected: set[Found]) -> None:
    assert endpoints([given_slice], "grpc") == expected


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 2)),
        max_size=20,
    )
)
def test_every_pod_is_there_once_and_ready_if_any_slice_says_so(pods: list[tuple[int, bool, bool, int]]) -> None:
    slices = [
        one(*[pod(f"10.0.0.{n}", f"u{n}", ready) for n, ready, _, s in pods if s == number], name=f"s{number}") for number in range(3)
    ]
    found = endpoints(slices, "grpc")
    assert {f.address for f in found} == {f"10.0.0.{n}:50053" for n, *_ in pods}
    assert len(found) == len({n for n, *_ in pods})
    assert {f.address for f in found if f.ready} == {f"10.0.0.{n}:50053" for n, ready, *_ in pods if ready}
