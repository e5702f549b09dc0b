"""A request id answers once: the same bytes for the same question, a refusal for another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.questions import ask, rank, strings
from tests.fakes.router_world import route, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument, Unavailable
from plait.telemetry.metrics import Metrics
from router.question import Question
from router.repeats import Repeats
from router.settings import RepeatsSettings

REGISTRY = snapshot(route(repeat_window_s=30))
REPEATED = explanation_pb.CACHE_STATUS_REPEATED


class World:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.runs = 0
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.repeats = Repeats(RepeatsSettings(), Metrics(), clock=lambda: self.now_s)
        self.road = self.repeats.around(self._make, "home", 30)

    async def ask(self, request: Any, **call: Any) -> Any:
        return await self.road(ask(REGISTRY, request, **call))

    async def _make(self, question: Question) -> Any:
        self.runs += 1
        number = self.runs
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        if isinstance(question.request, pb.PredictRequest):
            return pb.PredictResponse(request_id=question.request_id, model_version=str(number))
        return pb.RankResponse(item_ids=strings("i1"), scores=[number], request_id=question.request_id)


def same(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for saying that they are repeated."""
    kept = [type(answer).FromString(answer.SerializeToString()) for answer in (one, other)]
    for answer in kept:
        answer.ClearField("cache")
        answer.ClearField("age_us")
    return kept[0].SerializeToString() == kept[1].SerializeToString()


async def test_the_same_id_is_the_same_answer() -> None:
    world = World()
    first = await world.ask(rank(request_id="r1"))
    world.now_s += 29
    second = await world.ask(rank(request_id="r1"))
    assert world.runs == 1
    assert same(first, second)
    assert (first.cache, second.cache, second.age_us) == (0, REPEATED, 29_000_000)


async def test_after_the_window_it_is_a_new_call() -> None:
    world = World()
    await world.ask(rank(request_id="r1"))
    world.now_s += 30.5
    assert (await world.ask(rank(request_id="r1"))).scores[0] == 2
    assert (await world.ask(rank(request_id="r1"))).scores[0] == 2


async def test_without_an_id_every_call_runs() -> None:
    world = World()
    for _ in range(3):
        await world.ask(rank())
    assert world.runs == 3


@pytest.mark.parametrize("under_way", [False, True])
async def test_the_same_id_with_another_question_is_refused(under_way: bool) -> None:
    world = World()
    world.gate = asyncio.Event()
    first = asyncio.create_task(world.ask(rank(request_id="r1")))
    await asyncio.sleep(0)
    if not under_way:
        world.gate.set()
        await first
    other = asyncio.create_task(world.ask(rank("u2", request_id="r1")))
    await asyncio.sleep(0)
    world.gate.set()
    with pytest.raises(InvalidArgument, match="id of its own") as caught:
        await other
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert (await first).scores[0] == 1


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        (rank(request_id="r1"), {"tenant": "other"}),
        (rank(request_id="r1"), {"caller": "k2"}),
        (pb.PredictRequest(route="home", request_id="r1", entities=[
            types_pb2.EntityRows(entity_type="user", ids=strings("u1")), types_pb2.EntityRows(entity_type="item", ids=strings("i1")),
        ]), {}),
    ],
)  # fmt: skip
async def test_ids_of_another_caller_or_method_are_others(request_: Any, call: dict[str, Any]) -> None:
    world = World()
    await world.ask(rank(request_id="r1"))
    await world.ask(request_, **call)
    assert world.runs == 2


async def test_calls_that_meet_run_once_and_a_failure_is_tried_again() -> None:
    world = World()
    world.gate, world.error = asyncio.Event(), Unavailable("away")
    tasks = [asyncio.create_task(world.ask(rank(request_id="r1"))) for _ in range(5)]
    await asyncio.sleep(0)
    world.gate.set()
    assert {type(outcome) for outcome in await asyncio.gather(*tasks, return_exceptions=True)} == {Unavailable}
    assert world.runs == 1
    world.error = None
    assert (await world.ask(rank(request_id="r1"))).scores[0] == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["u1", "u2"]), st.floats(0, 20)), max_size=30))
async def test_each_id_answers_one_question_at_a_time(calls: list[tuple[str, str, float]]) -> None:
    world = World()
    model: dict[str, tuple[str, float, int]] = {}
    for request_id, subject, pause_s in calls:
        world.now_s += pause_s
        known = model.get(request_id)
        if known is None or world.now_s - known[1] > 30:
            model[request_id] = known = (subject, world.now_s, world.runs + 1)
        if known[0] == subject:
            assert (await world.ask(rank(subject, request_id=request_id))).scores[0] == known[2]
        else:
            with pytest.raises(InvalidArgument):
                await world.ask(rank(subject, request_id=request_id))
