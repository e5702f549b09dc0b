"""The wire work: every method of the contract is there, and hands on what it got."""

from __future__ import annotations

from typing import Any

import pytest

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import NotFound
from router.servicer import RouterServicer


class Page:
    """A page that answers by saying what it was asked, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def rank(self, request: pb.RankRequest) -> pb.RankResponse:
        if self.error is not None:
            raise self.error
        return pb.RankResponse(request_id=f"rank {request.request_id}")

    async def invalidate(self, request: pb.InvalidateCacheRequest) -> pb.InvalidateCacheResponse:
        self.forgotten = request.route
        return pb.InvalidateCacheResponse()

    async def record(self, request: pb.RecordOutcomeRequest) -> pb.RecordOutcomeResponse:
        return pb.RecordOutcomeResponse(accepted=7)

    async def predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        if self.error is not None:
            raise self.error
        return pb.PredictResponse(request_id=f"predict {request.request_id}")

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        if self.error is not None:
            raise self.error
        return pb.ExplainResponse(summary=f"explain {request.rank.request_id}")


async def test_outcomes_are_handed_on() -> None:
    page: Any = Page()
    assert (await RouterServicer(page, page, page).RecordOutcome(pb.RecordOutcomeRequest(), None)).accepted == 7


async def test_what_is_to_be_forgotten_is_handed_on() -> None:
    page: Any = Page()
    await RouterServicer(page, page, page).InvalidateCache(pb.InvalidateCacheRequest(route="home"), None)
    assert page.forgotten == "home"


def servicer(error: Exception | None = None) -> Any:
    page: Any = Page(error)
    return RouterServicer(page, page, page)


def test_no_method_of_the_contract_is_left_to_the_generated_stub() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["RouterService"].methods}
    assert methods <= vars(RouterServicer).keys()


async def test_each_method_asks_its_own_page() -> None:
    assert (await servicer().Rank(pb.RankRequest(request_id="1"), None)).request_id == "rank 1"
    assert (await servicer().Predict(pb.PredictRequest(request_id="2"), None)).request_id == "predict 2"
    request = pb.ExplainRequest(rank=pb.RankRequest(request_id="3"))
    assert (await servicer().Explain(request, None)).summary == "explain 3"


@pytest.mark.parametrize("method", ["Rank", "Predict", "Explain"])
async def test_errors_are_left_to_the_interceptor(method: str) -> None:
    error = NotFound("no such route")
    with pytest.raises(NotFound) as caught:
        await getattr(servicer(error), method)(pb.RankRequest(), None)
    assert caught.value is error
