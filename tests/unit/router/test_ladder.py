"""Down the rungs: exactly one answers, it is told which, and who fails late leaves time for the next."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import route, snapshot
from tests.unit.router.test_ranking import rank

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import DeadlineExceeded, FailedPrecondition, PlaitError, ResourceExhausted, Unavailable
from plait.registry.policies import Tier
from plait.registry.records import Variant
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router.asking import Asking
from router.expectations import Expectations
from router.ladder import Ladder
from router.question import Question
from router.route_table import Arm, compile_table
from router.stopwatch import Stopwatch
from router.trail import Trail

VARIANTS = (Variant(name="main", model="ranker", use="2"), Variant(name="light", model="ranker", use="1", weight=0))
LADDER = (Tier(tier="light", variant="light"), Tier(tier="popularity", feature="item-view:f1"))
FAILURES = {
    "late": DeadlineExceeded("late"),
    "away": Unavailable("away"),
    "full": ResourceExhausted("full", reason="OVERLOADED"),
    "broken": FailedPrecondition("did not load", reason="MODEL_FAILED"),
}
FINAL = {
    "quota": ResourceExhausted("no more", reason="QUOTA_EXCEEDED"),
    "missing": FailedPrecondition("missing", reason="FEATURES_MISSING"),
}
OUTCOMES = st.sampled_from(["ok", *FAILURES, *FINAL])


class Behind:
    """What is behind the ladder: answers or fails, by variant, and remembers who was asked and what was left."""

    def __init__(self, **outcomes: str) -> None:
        self.outcomes = outcomes
        self.asked: list[tuple[str, float]] = []

    async def road(self, question: Question) -> pb.RankResponse:
        question.watch.admitted = question.watch.stamp()
        return self._answer(question.arm.name, question)

    async def by_popularity(self, question: Question, popularity: Any) -> pb.RankResponse:
        return self._answer("popularity", question)

    def _answer(self, who: str, question: Question) -> pb.RankResponse:
        self.asked.append((who, question.deadline.remaining_s()))
        error = {**FAILURES, **FINAL}.get(self.outcomes.get(who, "ok"))
        if error is not None:
            raise error
        question.watch.predicted = question.watch.stamp()
        return pb.RankResponse(request_id=who)


def asked(request: Any = None, *, budget_s: float = 10.0, ladder: tuple[Tier, ...] = LADDER) -> Question:
    table = compile_table(snapshot(route(variants=VARIANTS, ladder=ladder, timeout_s=60.0)))
    call = Call(method="test", tenant="shop", deadline=Deadline.after(budget_s))
    return Asking(1 << 20).rank(request or rank(), table, call, Stopwatch(), Trail())


def expect(expectations: Expectations, arm: Arm, rows: int, took_s: float) -> None:
    """Have it expect so much, and not try nevertheless."""
    for _ in range(5):
        expectations.learn(arm, rows, took_s)
    expectations.probe(arm, rows)
    expectations.learn(arm, rows, took_s, answered=False)


async def climb(behind: Behind, question: Question, expectations: Expectations | None = None, **options: Any) -> Any:
    consulting: Any = behind
    ladder = Ladder(consulting, consulting, expectations or Expectations(), Metrics(), **options)
    return await ladder.around(behind.road, question.route)(question)


@given(outcomes=st.fixed_dictionaries(dict.fromkeys(("main", "light", "popularity"), OUTCOMES)), data=st.data())
async def test_exactly_one_rung_answers_or_the_last_error_stands(outcomes: dict[str, str], data: st.DataObject) -> None:
    behind, question, expectations = Behind(**outcomes), asked(), Expectations()
    for arm in (question.arm, question.route.by_name["light"]):
        expect(expectations, arm, question.rows, data.draw(st.sampled_from([0.0, 1.0, 100.0])))
    rungs = [("full", "main"), ("light", "light"), ("popularity", "popularity")]
    expected: PlaitError | str = ""
    passed = []
    for tier, who in rungs:
        arm = {"full": question.arm, "light": question.route.by_name["light"]}.get(tier)
        if arm is not None and expectations.expected_s(arm, question.rows) > 10:
            continue
        passed.append(who)
        expected = tier if outcomes[who] == "ok" else {**FAILURES, **FINAL}[outcomes[who]]
        if outcomes[who] not in FAILURES:
            break
    if isinstance(expected, PlaitError):
        with pytest.raises(PlaitError) as caught:
            await climb(behind, question, expectations)
        assert caught.value is expected
    else:
        answer = await climb(behind, question, expectations)
        assert (answer.request_id, question.tier) == (passed[-1], expected)
        assert question.reasons == ([] if expected == "full" else [f"tier_{expected}"])
        assert question.arm.name == {"light": "light"}.get(expected, "main")
        assert question.trail is not None
        assert [report.tier for report in question.trail.tiers if report.answered] == [expected]
    assert [who for who, _ in behind.asked] == passed


async def test_who_may_fail_late_leaves_time_for_the_next() -> None:
    behind, question = Behind(main="late", light="late"), asked()
    expectations = Expectations()
    expect(expectations, question.route.by_name["light"], question.rows, 2.0)
    await climb(behind, question, expectations)
    (_, full_s), (_, light_s), (_, last_s) = behind.asked
    assert 7.0 < full_s < 7.6
    assert full_s < light_s < last_s


async def test_what_is_known_to_take_too_long_is_not_tried() -> None:
    behind, question = Behind(), asked(budget_s=1.0)
    expectations = Expectations()
    expect(expectations, question.arm, question.rows, 5.0)
    await climb(behind, question, expectations)
    assert [who for who, _ in behind.asked] == ["light"]
    assert question.trail is not None
    assert [(t.tier, t.reason) for t in question.trail.tiers] == [
        ("full", "budget_too_small"), ("light", "answered"), ("popularity", "not_reached"),
    ]  # fmt: skip


async def test_a_rung_that_cannot_answer_the_request_is_no_rung() -> None:
    behind = Behind(main="away")
    predict = pb.PredictRequest(route="home")
    question = replace(asked(), request=predict, ids={"item": rank().candidates})  # nothing to read the light one's user by
    with pytest.raises(Unavailable):
        await climb(behind, question)
    assert [who for who, _ in behind.asked] == ["main"]


async def test_answers_without_a_model_are_bounded_and_then_the_refusal_stands() -> None:
    behind = Behind(main="full", light="full")
    with pytest.raises(ResourceExhausted) as caught:
        await climb(behind, asked(), most_without=0)
    assert caught.value is FAILURES["full"]


async def test_waits_in_vain_are_learnt_from() -> None:
    behind, question, expectations = Behind(main="late"), asked(), Expectations()
    await climb(behind, question, expectations)
    assert repr(expectations) == "<Expectations known=2>"


async def test_a_model_that_is_well_again_is_found_out() -> None:
    expectations, question = Expectations(), asked(budget_s=1.0)
    for _ in range(5):
        expectations.learn(question.arm, question.rows, 5.0)
    behind = Behind()
    for _ in range(3):
        await climb(behind, asked(budget_s=1.0), expectations)
    assert [who for who, _ in behind.asked] == ["main", "main", "main"]


async def test_what_asks_no_model_answers_even_when_the_time_is_just_over() -> None:
    class Slow(Behind):
        async def road(self, question: Question) -> pb.RankResponse:
            while question.deadline.remaining_s() > -0.02:
                await asyncio.sleep(0.005)
            return await super().road(question)

    behind, question = Slow(main="late"), asked(budget_s=0.02, ladder=LADDER[1:])
    await climb(behind, question)
    assert question.tier == "popularity"
    behind, question = Slow(main="late"), asked(budget_s=0.02, ladder=LADDER[:1])
    with pytest.raises(DeadlineExceeded):
        await climb(behind, question)
