"""What is answered without asking again: never too old, never another's, never what was told to be forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fakes.questions import ask, rank, strings
from tests.fakes.router_world import route, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import Unavailable
from plait.registry.policies import CachePolicy
from plait.registry.records import Epochs, Snapshot
from plait.telemetry.metrics import Metrics
from router.answers import Answers
from router.invalidation import Invalidations
from router.question import Question
from router.route_table import compile_table
from router.settings import CacheSettings
from router.trail import Trail

POLICY = CachePolicy(ttl_s=5, stale_s=10)
ROUTE = route(cache=POLICY)
MISS, HIT, STALE, SHARED = (getattr(explanation_pb, f"CACHE_STATUS_{word}") for word in ("MISS", "HIT", "STALE", "SHARED"))


@dataclass
class Made:
    """One run of the road: what the world was like when it began."""

    began_s: float
    tenant: str
    subject: str
    version: str
    epoch: int
    told: int


class World:
    """Answers before a road that writes its number into the scores, on a clock moved by hand."""

    def __init__(self, registry: Snapshot | None = None, chance: Callable[[], float] = lambda: 0.0) -> None:
        self.now_s = 100.0
        self.made: list[Made] = []
        self.reasons: list[str] = []
        self.tier = "full"
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.told: list[tuple[str, str, str]] = []
        self.log = Invalidations()
        self.answers = Answers(CacheSettings(), self.log, Metrics(), clock=lambda: self.now_s, chance=chance)
        self.registry = registry or snapshot(ROUTE)
        self.adopt(self.registry)

    def adopt(self, registry: Snapshot) -> None:
        self.registry = registry
        self.answers.adopt(registry)
        served = compile_table(registry).routes["home"]
        assert served.cache is not None
        self.road = self.answers.around(self._make, served, served.cache)

    def epoch_of(self, tenant: str) -> int:
        return self.registry.epochs_of(tenant, "item-view", 1).serving

    def question(self, request: Any = None, **call: Any) -> Question:
        return ask(self.registry, request or rank(), **call)

    async def ask(self, request: Any = None, **call: Any) -> Any:
        return await self.road(self.question(request, **call))

    def tell(self, tenant: str, kind: Any, name: str) -> None:
        space = (tenant, kind, "item" if kind == "entity" else "")
        self.log.tell([(space, [name])])
        self.told.append((tenant, kind, name))

    async def _make(self, question: Question) -> Any:
        number = len(self.made)
        assert question.request.subject.string_ids  # type: ignore[union-attr]
        subject = question.request.subject.string_ids[0]  # type: ignore[union-attr]
        self.made.append(Made(self.now_s, question.tenant, subject, question.arm.version, self.epoch_of(question.tenant), len(self.told)))
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        question.reasons += self.reasons
        question.tier = self.tier
        return pb.RankResponse(item_ids=strings(*question.candidates[:2]), scores=[number] * 2)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def test_a_life_of_an_answer() -> None:
    world = World()
    statuses = []
    for step_s in (0, 4.9, 5.2, 0.1, 5.0, 30):
        world.now_s += step_s
        response = await world.ask()
        await settle()
        statuses.append((response.cache, response.age_us, response.scores[0]))
    assert statuses == [(MISS, 0, 0), (HIT, 4_900_000, 0), (STALE, 10_100_000, 0), (HIT, 99_999, 1), (STALE, 5_099_999, 1), (MISS, 0, 3)]


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        (rank("u2"), {}),
        (rank(candidates=("i1", "i2")), {}),
        (rank(candidates=("i2", "i1", "i3")), {}),
        (rank(top_k=1), {}),
        (rank(request_features=[types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_INT64, data=bytes(8))]), {}),
        (
            rank(inline_features=[types_pb2.Tensor(name="user", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1, 2], data=bytes(8))]),
            {},
        ),
        (rank(), {"tenant": "other"}),
    ],
)
async def test_another_question_is_not_answered_from_it(request_: Any, call: dict[str, Any]) -> None:
    world = World()
    await world.ask()
    assert (await world.ask(request_, **call)).cache == MISS
    assert (await world.ask(request_, **call)).cache == HIT


async def test_who_asks_and_under_which_id_does_not_matter() -> None:
    world = World()
    first = await world.ask(rank(request_id="r1"), caller="k1")
    second = await world.ask(rank(request_id="r2", labels={"surface": "app"}), caller="k2")
    assert (first.cache, second.cache) == (MISS, HIT)
    assert second.request_id == ""  # to be signed for its own caller


async def test_an_explained_request_is_neither_answered_from_it_nor_kept() -> None:
    world = World()
    for explain, status in ((True, 0), (False, MISS), (True, 0), (False, HIT)):
        assert (await world.ask(rank(explain=explain))).cache == status


@pytest.mark.parametrize("fault", [{"reasons": ["features_stale"]}, {"tier": "light"}])
async def test_only_the_best_possible_answer_is_kept(fault: dict[str, Any]) -> None:
    world = World()
    vars(world).update(fault)
    assert [(await world.ask()).cache for _ in range(2)] == [MISS, MISS]


async def test_a_failure_is_not_kept_and_a_stale_answer_outlives_it() -> None:
    world = World()
    await world.ask()
    world.error, world.now_s = Unavailable("away"), world.now_s + 6
    for _ in range(2):
        assert (await world.ask()).cache == STALE
        await settle()
    world.now_s += 10
    with pytest.raises(Unavailable):
        await world.ask()


async def test_an_explanation_says_what_would_have_been_and_changes_nothing() -> None:
    world = World()

    async def explained() -> Any:
        question = world.question()
        question.trail = Trail()
        response = await world.road(question)
        assert response.cache == 0
        return question.trail.cache

    assert await explained() == MISS
    assert await explained() == MISS
    await world.ask()
    assert await explained() == HIT
    world.now_s += 6
    assert await explained() == STALE
    await settle()
    assert len(world.made) == 5  # nothing was made anew beside them
    world.tell("shop", "entity", "i1")
    assert await explained() == MISS
    world.gate = asyncio.Event()
    asking = asyncio.create_task(world.ask())
    await settle()
    explaining = asyncio.create_task(explained())
    await settle()
    world.gate.set()
    assert await explaining == SHARED
    await asking


async def test_all_who_wait_learn_what_the_road_learnt() -> None:
    world = World()
    world.gate, world.reasons, world.tier = asyncio.Event(), ["features_timed_out"], "light"
    questions = [world.question() for _ in range(100)]
    tasks = [asyncio.create_task(world.road(question)) for question in questions]
    await settle()
    world.gate.set()
    statuses = [response.cache for response in await asyncio.gather(*tasks)]
    assert len(world.made) == 1
    assert statuses == [MISS, *[SHARED] * 99]
    assert {(question.tier, *question.reasons) for question in questions} == {("light", "features_timed_out")}


async def test_who_comes_after_an_item_was_sold_does_not_board_what_began_before() -> None:
    world = World()
    world.gate = asyncio.Event()
    early = asyncio.create_task(world.ask())
    await settle()
    world.tell("shop", "entity", "i1")
    late = asyncio.create_task(world.ask())
    await settle()
    world.gate.set()
    assert (await early).scores[0] == 0
    assert (await late).scores[0] == 1
    assert (await world.ask()).scores[0] == 1


@pytest.mark.parametrize(
    ("told", "forgets"),
    [
        (("shop", "entity", "i1"), True),
        (("shop", "entity", "i3"), False),  # a candidate that the answer does not hold
        (("other", "entity", "i1"), False),
        (("shop", "route", "home"), True),
        (("shop", "route", "search"), False),
        (("shop", "model", "ranker"), True),
    ],
)
async def test_what_is_told_to_be_forgotten(told: tuple[str, Any, str], forgets: bool) -> None:
    world = World()
    await world.ask()
    world.tell(*told)
    assert ((await world.ask()).cache == MISS) == forgets


async def test_answers_to_a_subject_can_be_forgotten() -> None:
    world = World()
    await world.ask()
    world.log.tell([(("shop", "entity", "user"), ["u1"])])
    assert (await world.ask()).cache == MISS


async def test_an_early_renewal_is_made_beside_the_answer() -> None:
    world = World(chance=lambda: 1 - 1e-12)
    world.gate = asyncio.Event()
    first = asyncio.create_task(world.ask())
    await settle()
    world.now_s += 1  # it takes a second: 27 s early with such a chance
    world.gate.set()
    await first
    assert [(await world.ask()).cache for _ in range(3)] == [HIT] * 3
    await settle()
    assert len(world.made) == 2


async def test_a_change_of_weights_or_rules_keeps_what_is_kept() -> None:
    """Else each step of a rollout would ask every model for everything at once."""
    world = World()
    await world.ask()
    world.adopt(snapshot(replace(ROUTE, variants=(replace(ROUTE.variants[0], weight=5),), timeout_s=3, tenants=("shop",))))
    assert (await world.ask()).cache == HIT
    world.adopt(snapshot(replace(ROUTE, on_missing="fail")))
    assert (await world.ask()).cache == MISS


async def test_what_was_made_while_the_registry_changed_is_not_kept() -> None:
    """The model may have moved, and moved back, under the question: nobody knows which of them answered."""
    world = World()
    world.gate = asyncio.Event()
    before = world.registry
    asked = asyncio.create_task(world.ask())
    await settle()
    world.adopt(replace(before, models={"ranker": replace(before.models["ranker"], aliases={"champion": "1"})}))
    world.adopt(snapshot(replace(ROUTE, on_missing="fail")))
    world.gate.set()
    await asked
    world.adopt(before)
    assert (await world.ask()).cache == MISS
    assert (await world.ask()).cache == HIT


steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 6.0, 20.0])),
        st.tuples(st.just("ask"), st.sampled_from(["shop", "other"]), st.sampled_from(["u1", "u2"])),
        st.tuples(st.just("item"), st.sampled_from(["shop", "other"]), st.sampled_from(["i1", "i2", "i3"])),
        st.tuples(st.just("model"), st.sampled_from(["shop", "other"])),
        st.tuples(st.just("champion"), st.sampled_from(["1", "2"])),
        st.tuples(st.just("epoch"), st.sampled_from(["shop", "other"])),
        st.tuples(st.just("shut")),
        st.tuples(st.just("open")),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@example([("shut",), ("ask", "shop", "u1"), ("wait", 20.0), ("ask", "shop", "u1"), ("open",)])
@example([("shut",), ("ask", "shop", "u1"), ("item", "shop", "i1"), ("ask", "shop", "u1"), ("open",), ("ask", "shop", "u1")])
@example([("shut",), ("ask", "other", "u2"), ("ask", "other", "u2"), ("model", "other"), ("epoch", "other")])
@given(steps)
async def test_no_answer_is_ever_wrong(script: list[Any]) -> None:
    """Against what the world was like when the answer was begun, whatever happened in between and however slow the road is."""
    world = World()
    waiting: list[tuple[asyncio.Task[Any], Question, int, float, int]] = []

    async def check(finished: bool = False) -> None:
        await settle()
        for entry in list(waiting):
            task, question, told, asked_s, epoch = entry
            if not (task.done() or finished):
                continue
            waiting.remove(entry)
            response = await task
            made = world.made[int(response.scores[0])]
            subject = question.request.subject.string_ids[0]  # type: ignore[union-attr]
            assert (made.tenant, made.subject, made.version) == (question.tenant, subject, question.arm.version)
            assert made.epoch >= epoch  # (begun anew since, it is of the newest)
            assert asked_s - made.began_s <= POLICY.ttl_s + POLICY.stale_s
            if asked_s - made.began_s > POLICY.ttl_s:
                assert response.cache in (STALE, SHARED)
            between = world.told[made.told : told]
            names = {("model", "ranker"), *(("entity", item) for item in response.item_ids.string_ids)}
            assert not any(tenant == question.tenant and (kind, name) in names for tenant, kind, name in between)

    for action, *given_ in script:
        if action == "wait":
            world.now_s += given_[0]
        elif action == "ask":
            question = world.question(rank(given_[1]), tenant=given_[0])
            task = asyncio.create_task(world.road(question))
            waiting.append((task, question, len(world.told), world.now_s, world.epoch_of(given_[0])))
        elif action == "item":
            world.tell(given_[0], "entity", given_[1])
        elif action == "model":
            world.tell(given_[0], "model", "ranker")
        elif action == "champion":
            model = world.registry.models["ranker"]
            world.adopt(replace(world.registry, models={"ranker": replace(model, aliases={"champion": given_[0]})}))
        elif action == "epoch":
            at = (given_[0], "item-view", 1)
            epoch = world.registry.epochs_of(*at).serving + 1
            world.adopt(replace(world.registry, epochs={**world.registry.epochs, at: Epochs(serving=epoch, newest=epoch)}))
        elif action == "shut":
            world.gate = world.gate or asyncio.Event()
        elif world.gate is not None:
            world.gate.set()
            world.gate = None
        await check()
    if world.gate is not None:
        world.gate.set()
    await check(finished=True)
    await world.answers.close()
