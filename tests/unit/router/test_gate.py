"""Who gets in, who waits and who is sent away, through the gate of a real route; on a loop whose timers are held by hand."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tests.fakes.router_world import DI, route, snapshot

from plait.api.inference.v2 import inference_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted
from plait.registry.policies import CachePolicy, Tier
from plait.registry.records import Tenant
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router.gate import Gate
from router.question import Question, Response
from router.quotas import Quotas
from router.route_table import compile_table
from router.settings import AdmissionSettings
from router.stopwatch import Stopwatch


class Door:
    """A gate with a room behind it, that guests stay in until they are told to leave."""

    def __init__(
        self, limit: int = 1, queue: int = 8, *, tenants: dict[str, float] | None = None, priority: str = "normal", **more: Any
    ) -> None:
        self.metrics = Metrics()
        settings = AdmissionSettings(limit=limit, queue=queue, **{"max_wait_s": 30.0, "adaptive": False, **more})
        self.gate = Gate(settings, Quotas(), self.metrics)
        registry = snapshot(route(priority=priority))
        for name, weight in (tenants or {}).items():
            registry.tenants[name] = Tenant(name=name, weight=weight)  # type: ignore[index]
        self.gate.adopt(registry)
        self.route = compile_table(registry).routes["home"]
        self.road = self.gate.around(self._room, self.route)
        self.inside: list[asyncio.Event] = []
        self.answer: inference_pb2.ModelInferResponse | None = None
        self.error: PlaitError | None = None

    def __repr__(self) -> str:
        return repr(self.gate)

    async def _room(self, question: Question) -> Response:
        done = asyncio.Event()
        self.inside.append(done)
        await done.wait()
        question.scored = self.answer
        if self.error is not None:
            raise self.error
        return pb.RankResponse()

    def enter(self, deadline: Deadline, *, tenant: str = "shop", rows: int = 3, asked: str = "") -> Any:
        """Return what goes in; it is over when the guest has left."""
        return self.road(
            Question(
                route=self.route, arm=self.route.weighted[0], request=pb.RankRequest(), ids={}, subject="u", candidates=(), rows=rows, inline={},
                outputs=(), request_id="r", tenant=tenant, caller="k1", scopes=frozenset(), metadata=(("x-plait-priority", asked),) * bool(asked),
                deadline=deadline, watch=Stopwatch(), revision=1,
            )
        )  # fmt: skip

    def knock(self, deadline: Deadline, tenant: str = "shop") -> None:
        self.gate.knock(Call(method="/m", tenant=tenant, deadline=deadline), "home")

    async def leave(self) -> None:
        """Whoever has been inside longest leaves."""
        self.inside.pop(0).set()
        await settle()

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


class Timers:
    """Stands in for `loop.call_later`: what was asked for is kept, and goes off when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[float, Any, tuple[Any, ...]]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, delay_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        self.asked.append((delay_s, callback, arguments))
        return asyncio.TimerHandle(loop.time() + delay_s, callback, arguments, loop)

    def go_off(self, index: int = 0) -> None:
        _, callback, arguments = self.asked[index]
        callback(*arguments)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(6):
        await asyncio.sleep(0)


async def guests(door: Door, count: int, deadline: Deadline | None = None, **how: Any) -> list[asyncio.Task[Response]]:
    tasks = [asyncio.create_task(door.enter(deadline or Deadline.never(), **how), name=f"guest {n}") for n in range(count)]
    await settle()
    return tasks


async def refused(door: Door, deadline: Deadline | None = None, **how: Any) -> PlaitError:
    with pytest.raises(PlaitError) as caught:
        await door.enter(deadline or Deadline.never(), **how)
    return caught.value


async def empty(door: Door, *tasks: asyncio.Task[Response]) -> None:
    """Let everybody out."""
    while door.inside:
        await door.leave()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert "in_flight=0/" in repr(door)
    assert "waiting=0/" in repr(door)
    assert door.gate._admission._flows == 0


async def test_as_many_as_the_limit_get_in_at_once_and_the_others_in_turn() -> None:
    door = Door(limit=3)
    tasks = await guests(door, 5)
    assert repr(door) == "<Gate <Admission in_flight=3/3 waiting=2/8>>"
    assert len(door.inside) == 3
    assert door.gate.load == 1
    assert door.counted("plait_router_queued", **{"class": "normal"}) == 2
    await door.leave()
    assert repr(door) == "<Gate <Admission in_flight=3/3 waiting=1/8>>"
    await empty(door, *tasks)
    assert all(task.exception() is None for task in tasks)
    assert door.counted("plait_router_wait_seconds_count", **{"class": "normal"}) == 2


async def test_who_comes_while_others_wait_does_not_overtake_them() -> None:
    door = Door()
    first = await guests(door, 2)
    door.inside.pop(0).set()
    [late] = await guests(door, 1)
    assert repr(door) == "<Gate <Admission in_flight=1/1 waiting=1/8>>"
    assert first[0].done()
    assert not late.done()
    await empty(door, *first, late)


@pytest.mark.parametrize("queue", [0, 2])
async def test_beyond_the_queue_everyone_is_sent_away_at_once_with_a_time_to_come_back(queue: int) -> None:
    door = Door(queue=queue, retry_after_s=0.25)
    tasks = await guests(door, 1 + queue)
    error = await refused(door)
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "OVERLOADED"
    assert error.retry_after_s is not None
    assert 0.2 <= error.retry_after_s <= 0.3
    assert error.message.startswith(f"the router is at its limit of 1 requests and {queue} are waiting already: retry in ")
    assert door.counted("plait_router_refused_total", reason="OVERLOADED", **{"class": "normal"}) == 1
    await empty(door, *tasks)


async def test_too_long_a_wait_is_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(max_wait_s=0.5)
    timers = Timers(monkeypatch)
    tasks = await guests(door, 2)
    assert [delay_s for delay_s, _, _ in timers.asked] == [0.5]
    timers.go_off()
    with pytest.raises(ResourceExhausted, match="the wait took too long") as caught:
        await tasks[1]
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_s is not None
    assert repr(door) == "<Gate <Admission in_flight=1/1 waiting=0/8>>"
    await empty(door, *tasks)


async def test_nobody_waits_into_the_time_the_answer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(min_budget_s=1.0)
    timers = Timers(monkeypatch)
    tasks = await guests(door, 1)
    [late] = await guests(door, 1, Deadline.after(6.0))
    assert 0 < timers.asked[0][0] <= 5.0
    timers.go_off()
    with pytest.raises(DeadlineExceeded) as caught:
        await late
    assert caught.value.reason == "BUDGET_TOO_SMALL"
    await empty(door, *tasks)


@pytest.mark.parametrize("left_s", [-1.0, 0.0, 0.9])
async def test_a_budget_that_is_too_small_is_refused_at_the_knock_and_before_a_wait(left_s: float) -> None:
    door = Door(min_budget_s=1.0)
    with pytest.raises(DeadlineExceeded, match="1000 ms"):
        door.knock(Deadline.after(left_s))
    tasks = await guests(door, 1)
    error = await refused(door, Deadline.after(left_s))
    assert error.reason == "BUDGET_TOO_SMALL"
    assert error.retry_after_s is None
    assert door.counted("plait_router_refused_total", reason="BUDGET_TOO_SMALL", **{"class": "normal"}) == 2
    door.knock(Deadline.after(30.0))
    await empty(door, *tasks)


async def test_who_gives_up_waiting_leaves_the_queue() -> None:
    door = Door()
    tasks = await guests(door, 3)
    tasks[1].cancel()
    await settle()
    assert repr(door) == "<Gate <Admission in_flight=1/1 waiting=1/8>>"
    await empty(door, *tasks)
    assert tasks[2].exception() is None


async def test_a_turn_that_comes_in_the_moment_its_guest_leaves_goes_to_the_next() -> None:
    door = Door()
    tasks = await guests(door, 3)
    door.inside.pop(0).set()
    while not tasks[0].done():
        await asyncio.sleep(0)
    tasks[1].cancel()  # has its turn, and may not have run yet
    await settle()
    assert tasks[1].cancelled()
    assert repr(door) == "<Gate <Admission in_flight=1/1 waiting=0/8>>"
    await empty(door, *tasks)
    assert tasks[2].exception() is None


async def test_a_turn_that_comes_just_after_its_guest_left_goes_to_the_next() -> None:
    door = Door()
    tasks = await guests(door, 3)
    tasks[1].cancel()  # has not run yet, and still stands in the queue
    door.gate._leave(door.gate._flows[1]["shop"], 1)
    await settle()
    assert len(door.inside) == 2
    assert repr(door) == "<Gate <Admission in_flight=1/1 waiting=0/8>>"
    door.gate._admission._take(1, 0.0)  # what the test gave back for the first
    door.gate._admission._hold(door.gate._flows[1]["shop"], 1)
    await empty(door, *tasks)


async def test_a_turn_is_not_given_to_who_was_told_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door()
    timers = Timers(monkeypatch)
    tasks = await guests(door, 3)
    timers.go_off(0)
    await door.leave()
    assert isinstance(tasks[1].exception(), ResourceExhausted)
    assert len(door.inside) == 1
    timers.go_off(1)  # after its turn came: takes nothing away
    await empty(door, *tasks)
    assert tasks[2].exception() is None


async def test_who_is_cancelled_after_it_was_told_to_go_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door()
    timers = Timers(monkeypatch)
    tasks = await guests(door, 2)
    timers.go_off(0)
    tasks[1].cancel()
    await settle()
    assert tasks[1].done()
    await empty(door, *tasks)


async def test_whatever_happens_no_place_is_lost() -> None:
    random_ = random.Random(7)  # noqa: S311
    door = Door(limit=3, queue=20, tenants={"a": 1.0, "b": 3.0})
    tasks: list[asyncio.Task[Response]] = []
    for _ in range(300):
        tenant = random_.choice(["a", "b", "shop", "nobody-knows"])
        tasks.append(asyncio.create_task(door.enter(Deadline.never(), tenant=tenant, rows=random_.randint(1, 50))))
        for _ in range(random_.randint(0, 3)):
            await asyncio.sleep(0)
        if random_.random() < 0.4:
            random_.choice(tasks).cancel()
        if door.inside and random_.random() < 0.5:
            door.inside.pop(random_.randrange(len(door.inside))).set()
    await settle()
    await empty(door, *tasks)
    assert any(task.cancelled() for task in tasks)
    assert any(not task.cancelled() and isinstance(task.exception(), ResourceExhausted) for task in tasks)


async def test_knocking_takes_no_place_and_refuses_what_could_not_wait() -> None:
    door = Door(limit=1, queue=1)
    door.knock(Deadline.never())
    tasks = await guests(door, 1)
    door.knock(Deadline.never())  # somebody may still wait
    tasks += await guests(door, 1)
    with pytest.raises(ResourceExhausted, match="1 are waiting already"):
        door.knock(Deadline.never())
    await door.leave()
    door.knock(Deadline.never())
    await empty(door, *tasks)


async def test_a_flood_gives_its_places_in_the_queue_to_others() -> None:
    door = Door(limit=1, queue=4, tenants={"flood": 1.0, "polite": 1.0})
    tasks = await guests(door, 5, tenant="flood")
    door.knock(Deadline.never(), "polite")
    [polite] = await guests(door, 1, tenant="polite")
    assert isinstance(tasks[-1].exception(), ResourceExhausted)
    assert "others were before this one" in str(tasks[-1].exception())
    await door.leave()
    await door.leave()
    assert not polite.done()
    assert len(door.inside) == 1
    await empty(door, *tasks, polite)
    assert polite.exception() is None


async def test_tenants_that_nobody_knows_share_one_flow() -> None:
    door = Door(limit=1, queue=50)
    tasks = []
    for n in range(20):
        tasks += await guests(door, 1, tenant=f"made-up-{n}")
    assert list(door.gate._admission.queue._classes[1].tenants) == [""]
    await empty(door, *tasks)


async def test_more_values_than_one_request_may_ask_for_are_refused_whatever_is_free() -> None:
    door = Door(limit=100, max_cells=10 * DI)
    tasks = await guests(door, 1, rows=10)
    error = await refused(door, rows=11)
    assert (error.reason, error.retry_after_s) == ("REQUEST_TOO_COSTLY", None)
    assert f"11 candidates with {DI} values each are more than the {10 * DI} values" in error.message
    await empty(door, *tasks)


async def test_the_gate_learns_from_answers_what_rows_cost_and_charges_for_it() -> None:
    door = Door(limit=64, adaptive=True, start=64)
    for rows in [10, 1000] * 30:
        door.answer = inference_pb2.ModelInferResponse()
        door.answer.parameters["compute_us"].int64_param = 1000 + 10 * rows
        door.answer.parameters["batch_rows"].int64_param = rows
        door.gate._admission.limiter._next_s = 0.0  # a step's time has passed
        [task] = await guests(door, 1, rows=rows)
        await door.leave()
        await task
    [line] = door.gate._costs._lines.values()
    assert line.of(500) == pytest.approx(6.0, rel=0.05)
    assert door.gate._admission.limiter.pass_ms > 0
    tasks = await guests(door, 1, rows=10)
    assert "in_flight=1/" in repr(door)
    tasks += await guests(door, 1, rows=2000)
    assert int(repr(door).partition("in_flight=")[2].partition("/")[0]) >= 3
    await empty(door, *tasks)


@pytest.mark.parametrize(("error", "dropped"), [(ResourceExhausted("busy"), True), (DeadlineExceeded("late"), False)])
async def test_a_busy_worker_counts_and_a_caller_with_no_time_does_not(error: PlaitError, dropped: bool) -> None:
    door = Door(limit=64, adaptive=True)
    door.gate._costs._lines[door.route.weighted[0].model, door.route.weighted[0].version].a = 60_000.0
    door.error = error
    tasks = await guests(door, 20)
    await empty(door, *tasks)
    assert (door.gate._admission.limiter.limit < 32) is dropped


async def test_a_new_snapshot_brings_new_weights_and_keeps_what_is_under_way() -> None:
    door = Door(limit=1, tenants={"a": 1.0})
    tasks = await guests(door, 1, tenant="a")
    before = door.gate._flows[1]["a"]
    registry = snapshot(route(priority="critical"))
    registry.tenants["a"] = Tenant(name="a", weight=1.0)  # type: ignore[index]
    door.gate.adopt(registry)
    assert door.gate._flows[1]["a"] is before
    registry.tenants["a"] = Tenant(name="a", weight=2.0)  # type: ignore[index]
    door.gate.adopt(registry)
    assert door.gate._flows[1]["a"].weight == 2.0
    await empty(door, *tasks)


async def test_a_critical_route_goes_before_a_sheddable_one() -> None:
    door = Door(limit=1)
    registry = snapshot(route(priority="critical"), route("low", priority="sheddable"))
    door.gate.adopt(registry)
    table = compile_table(registry)
    door.road = door.gate.around(door._room, table.routes["low"])
    tasks = await guests(door, 4)
    door.road = door.gate.around(door._room, table.routes["home"])
    tasks += await guests(door, 2)
    await door.leave()
    await door.leave()
    await door.leave()
    assert [task.done() for task in tasks] == [True, False, False, False, True, True]
    await empty(door, *tasks)


@pytest.mark.parametrize(("asked", "before"), [("sheddable", 1), ("normal", 2), ("critical", 2), ("urgent", 2), ("", 2)])
async def test_a_caller_may_lower_its_class_and_not_raise_it(asked: str, before: int) -> None:
    door = Door(limit=1)
    tasks = await guests(door, 1)
    lowered = await guests(door, 1, asked=asked)
    later = await guests(door, 1)
    await door.leave()
    await door.leave()
    assert [task.done() for task in (*tasks, *lowered, *later)] == ([True, True, False] if before == 2 else [True, False, True])
    await empty(door, *tasks, *lowered, *later)


async def test_a_route_that_has_other_answers_than_a_models_is_not_refused_at_the_knock() -> None:
    door = Door(limit=1, queue=0)
    tasks = await guests(door, 1)
    registry = snapshot(
        route(), route("kept", cache=CachePolicy(ttl_s=5.0)), route("stepping", ladder=(Tier(tier="popularity", feature="item-view:f0"),))
    )
    door.gate.adopt(registry)
    for name in ("kept", "stepping", "unknown"):
        door.gate.knock(Call(method="/m", tenant="shop", deadline=Deadline.never()), name)
    await empty(door, *tasks)


async def test_nobody_waits_into_the_time_that_answers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(limit=1)
    [line] = door.gate._costs._lines.values()
    line.took(4.0)
    tasks = await guests(door, 1)
    timers = Timers(monkeypatch)
    error = await refused(door, Deadline.after(5.0))
    assert error.reason == "OVERLOADED"
    assert "its deadline leaves no time to wait" in error.message
    [late] = await guests(door, 1, Deadline.after(10.0))
    assert 4.0 < timers.asked[0][0] <= 10 - 1.3 * 4.0
    timers.go_off()
    with pytest.raises(ResourceExhausted, match="the wait took too long"):
        await late
    await empty(door, *tasks)
