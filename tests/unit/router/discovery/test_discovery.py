"""What every way of finding endpoints does alike: it tells of all of them at once, and goes on until it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from tests.fakes.kubernetes_api import KubernetesApi, endpoint, endpoint_slice

from router.discovery.found import Discovery, Found
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.static import StaticDiscovery

TWO = frozenset({Found(address="10.0.0.1:50053", zone="a"), Found(address="10.0.0.2:50053", zone="b")})


@pytest_asyncio.fixture
async def kubernetes() -> AsyncIterator[KubernetesApi]:
    async with KubernetesApi() as api:
        await api.put(endpoint_slice("workers-1", endpoint("10.0.0.1", zone="a"), endpoint("10.0.0.2", zone="b")))
        yield api


Make = Callable[[], Discovery]


@pytest.fixture(params=["static", "kubernetes"])
def make(request: pytest.FixtureRequest, kubernetes: KubernetesApi) -> Make:
    if request.param == "static":
        return lambda: StaticDiscovery(TWO)
    return lambda: KubernetesDiscovery("ml", "workers", "grpc", configure=kubernetes.configuration)


async def test_it_tells_of_all_endpoints_and_goes_on(make: Make) -> None:
    told: asyncio.Queue[frozenset[Found]] = asyncio.Queue()
    running = asyncio.create_task(make().run(told.put_nowait))
    assert await asyncio.wait_for(told.get(), 20) == TWO
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert told.empty()


async def test_several_can_run_at_once_and_one_can_run_again(make: Make) -> None:
    discovery = make()
    for _ in range(2):
        told: asyncio.Queue[frozenset[Found]] = asyncio.Queue()
        running = [asyncio.create_task(discovery.run(told.put_nowait)) for _ in range(2)]
        assert [await asyncio.wait_for(told.get(), 20) for _ in running] == [TWO, TWO]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_repr_says_what_it_looks_for(make: Make) -> None:
    assert repr(make()) in ("<StaticDiscovery of 2>", "<KubernetesDiscovery ml/workers:grpc>")
