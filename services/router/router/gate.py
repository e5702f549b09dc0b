"""Where work begins: what is before the gate costs little, what is behind it is bounded, and nobody's flood is another's wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted
from plait.registry.records import Snapshot, Tenant
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router import wire
from router.admission import Admission, Flow, Waiter
from router.connections import CallPlan
from router.cost import Costs, Line
from router.fair_queue import PRIORITIES
from router.question import Question, Response, Road
from router.quotas import Quotas
from router.route_table import Arm, ServingRoute
from router.settings import AdmissionSettings
from router.tensors import parameter

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

_NORMAL: Final = PRIORITIES.index("normal")
_PRIORITY: Final = "x-plait-priority"
_ENOUGH: Final = 32  # answers of a step of the limit are all learnt from, of more
_ONE_OF: Final = 8  # one: learning takes longer than all else here
_UNKNOWN_COLUMNS: Final = 80  # of a version that no route leads to; what it really costs is learnt from its answers
_ANSWER_TIMES: Final = 1.3  # the time an answer takes on average: nobody waits into what its own needs
_LATE: Final = 2.0  # times the predicted cost behind the gate: whoever had so long and ran out of time met a queue


class GateMetrics:
    """What the gate counts."""

    def __init__(self, metrics: Metrics, admission: Admission) -> None:
        metrics.gauge("plait_router_limit", "requests that may be under way at once").set_function(lambda: admission.limiter.limit)
        metrics.gauge("plait_router_in_flight", "requests under way, in requests of mean cost").set_function(lambda: admission.in_flight)
        queued = metrics.gauge("plait_router_queued", "requests that wait for their turn, by class", ("class",))
        for rank, name in enumerate(PRIORITIES):
            queued.labels(name).set_function(partial(admission.queue.waiting, rank))
        refused = metrics.counter("plait_router_refused", "requests refused at the gate, by reason and class", ("reason", "class"))
        waits = metrics.histogram("plait_router_wait_seconds", "time until their turn of those that had to wait, seconds", ("class",))
        self.refused = refused
        self.waits = [waits.labels(name) for name in PRIORITIES]


class Gate:
    """Stands in a road where work begins; see `Admission` for who gets in, and `quotas` for how much of it a tenant may use at all."""

    def __init__(self, settings: AdmissionSettings, quotas: Quotas, metrics: Metrics) -> None:
        self._settings = settings
        self._quotas = quotas
        self._admission = Admission(settings)
        self._metrics = GateMetrics(metrics, self._admission)
        self._costs = Costs()
        self._answered = 0
        self._flows: list[dict[str, Flow]] = [{} for _ in PRIORITIES]
        self._others = [Flow(rank, "", 1.0) for rank in range(len(PRIORITIES))]
        self._ranks: Mapping[str, int] = {}
        self._straight: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<Gate {self._admission!r}>"

    @property
    def load(self) -> float:
        """What is under way over what may be: 1 where somebody would have to wait."""
        return self._admission.in_flight / self._admission.limiter.limit

    def adopt(self, snapshot: Snapshot) -> None:
        """Take the tenants' weights and quotas and the routes' classes from a new snapshot."""
        self._quotas.adopt(snapshot)
        self._flows = [
            {tenant.name: self._same_flow(rank, tenant) for tenant in snapshot.tenants.values()} for rank in range(len(PRIORITIES))
        ]
        self._ranks = {route.name: PRIORITIES.index(route.priority) for route in snapshot.routes.values()}
        self._straight = frozenset(r.name for r in snapshot.routes.values() if not (r.ladder or r.cache or r.repeat_window_s))
        self._costs.keep({(model.name, version.version) for model in snapshot.models.values() for version in model.versions})

    def knock(self, call: Call, route: str) -> None:
        """Count a request, and refuse what could not be let in anyway before anything is done for it. Raises as the road behind the gate would.

        A route that knows other answers than a model's is not refused for want of a place.
        """
        if call.deadline.remaining_s() < self._settings.min_budget_s:
            raise self._refused(self._too_late(), self._ranks.get(route, _NORMAL))
        quota = self._quotas.of.get(call.tenant)
        if quota is not None:
            try:
                quota.request()
            except ResourceExhausted as error:
                raise self._refused(error, self._ranks.get(route, _NORMAL)) from None
        if len(self._admission.queue) and route in self._straight:
            rank = self._ranks[route]
            try:
                self._admission.knock(self._flow(rank, call.tenant))
            except ResourceExhausted as error:
                raise self._refused(error, rank) from None

    def around(self, road: Road, route: ServingRoute) -> Road:
        """Return the road behind the gate, under the snapshot that was adopted last.

        It raises DeadlineExceeded (BUDGET_TOO_SMALL) when less than `min_budget_s` is left, now or after the wait; ResourceExhausted:
        OVERLOADED, with when to come back, when a turn would take too long, QUOTA_EXCEEDED with which of the tenant's quotas is used up, and
        REQUEST_TOO_COSTLY when it asks for more values than `max_cells`.
        """
        admission = self._admission
        rank = self._ranks.get(route.name, _NORMAL)
        flows, others = self._flows[rank], self._others[rank]
        arms = {arm.name: (self._line(arm), self._settings.max_cells // max(1, _columns(arm))) for arm in route.by_name.values()}

        async def gated(question: Question) -> Response:
            line, most_rows = arms[question.arm.name]
            rows = question.rows
            if rows > most_rows:
                raise self._refused(self._too_costly(rows, question.arm), rank)
            flow = flows.get(question.tenant) or others
            slots = admission.enter(flow, line.a + line.b * rows)
            if not slots:
                flow = self._lowered(flow, question.metadata)
                slots = await self._wait(flow, line, rows, question.deadline)
            question.watch.admitted = question.watch.stamp()
            began_s = time.monotonic()
            try:
                response = await road(question)
            except (ResourceExhausted, DeadlineExceeded) as error:
                self._learn_from(error, line.of(rows), began_s)
                raise
            else:
                if self._teaches():
                    self._learn(question.scored, rows, line, began_s)
                return response
            finally:
                self._leave(flow, slots)

        async def counted(question: Question) -> Response:
            quota = self._quotas.of.get(question.tenant)
            if quota is None:
                return await gated(question)
            try:
                quota.begin(question.rows)
            except ResourceExhausted as error:
                raise self._refused(error, rank) from None
            try:
                return await gated(question)
            finally:
                quota.end()

        return counted if self._quotas.of else gated

    async def infer(self, call: Call, plan: CallPlan, route: str, send: Callable[[], Awaitable[bytes]]) -> bytes:
        """Have an inference done behind the gate that nobody looks into, as its bytes; `route` is empty where a model was named.

        Raises as a road behind the gate does.
        """
        rank = self._ranks.get(route, _NORMAL)
        quota = self._quotas.of.get(call.tenant)
        if quota is None:
            return await self._infer(call, plan, rank, send)
        try:
            quota.begin(plan.rows)
        except ResourceExhausted as error:
            raise self._refused(error, rank) from None
        try:
            return await self._infer(call, plan, rank, send)
        finally:
            quota.end()

    async def _infer(self, call: Call, plan: CallPlan, rank: int, send: Callable[[], Awaitable[bytes]]) -> bytes:
        admission, rows = self._admission, plan.rows
        line = self._costs.line(plan.model, plan.version, _UNKNOWN_COLUMNS)
        flow = self._flow(rank, call.tenant)
        slots = admission.enter(flow, line.of(rows))
        if not slots:
            flow = self._lowered(flow, call.metadata)
            slots = await self._wait(flow, line, rows, plan.deadline)
        began_s = time.monotonic()
        try:
            answer = await send()
        except (ResourceExhausted, DeadlineExceeded) as error:
            self._learn_from(error, line.of(rows), began_s)
            raise
        else:
            if self._teaches():
                self._learn(wire.without_tensors(answer), rows, line, began_s)
            return answer
        finally:
            self._leave(flow, slots)

    def _teaches(self) -> bool:
        """Whether this answer is one to learn from."""
        self._answered += 1
        return self._admission.limiter.samples < _ENOUGH or not self._answered % _ONE_OF

    def _learn(self, answer: inference_pb2.ModelInferResponse | None, rows: int, line: Line, began_s: float) -> None:
        """Hear from a worker's answer what it took."""
        admission = self._admission
        if answer is not None and "compute_us" in answer.parameters:  # (a foreign server does not say)
            compute_ms = parameter(answer, "compute_us") / 1e3
            batch_rows = parameter(answer, "batch_rows")
            admission.limiter.sample(line.window(rows), parameter(answer, "queue_us") / 1e3, compute_ms)
            line.learn(rows, compute_ms * min(1.0, rows / batch_rows) if batch_rows else compute_ms)
        now_s = time.monotonic()
        line.took(now_s - began_s)
        admission.answered(now_s - began_s, now_s)

    def _learn_from(self, error: Exception, cost_ms: float, began_s: float) -> None:
        """Hear from a worker that it was too busy; a caller that gave too little time says nothing of that."""
        now_s = time.monotonic()
        if isinstance(error, ResourceExhausted) or (now_s - began_s) * 1e3 > _LATE * cost_ms:
            self._admission.limiter.dropped()
            self._admission.answered(now_s - began_s, now_s)

    def _leave(self, flow: Flow, slots: int) -> None:
        self._admission.leave(flow, slots)
        self._let_in()

    def _let_in(self) -> None:
        admission = self._admission
        if len(admission.queue):
            for waiter in admission.turns():
                if waiter.turn.done():  # its caller has just gone
                    admission.leave(waiter.flow, waiter.slots)
                else:
                    waiter.turn.set_result(None)

    async def _wait(self, flow: Flow, line: Line, rows: int, deadline: Deadline) -> int:
        """Wait for a turn and return the places taken."""
        admission, settings, rank = self._admission, self._settings, flow.rank
        began_s = time.monotonic()
        budget_s = deadline.at_s - began_s - settings.min_budget_s
        if budget_s < 0:
            raise self._refused(self._too_late(), rank)
        spare_s = budget_s - _ANSWER_TIMES * line.behind_s
        if spare_s < 0:
            raise self._refused(admission.overloaded("its deadline leaves no time to wait", line.behind_s), rank)
        cost, loop = line.of(rows), asyncio.get_running_loop()
        waiter = Waiter.of(flow, cost, admission.slots(cost), loop.create_future())
        try:
            patience_s, victim = admission.line_up(waiter)
        except ResourceExhausted as error:
            raise self._refused(error, rank) from None
        if victim is not None:
            _send_away(victim, admission.overloaded("others were before this one", patience_s))
        late = (
            self._too_late() if budget_s < patience_s and not line.behind_s else admission.overloaded("the wait took too long", patience_s)
        )
        timer = loop.call_later(min(spare_s, patience_s), self._give_up, waiter, late)
        try:
            await waiter.turn
        except PlaitError as error:
            raise self._refused(error, rank) from None
        except asyncio.CancelledError:
            self._forget(waiter)
            raise
        finally:
            timer.cancel()
        self._metrics.waits[rank].observe(time.monotonic() - began_s)
        return waiter.slots

    def _give_up(self, waiter: Waiter, error: Exception) -> None:
        if self._admission.give_up(waiter):
            _send_away(waiter, error)
            self._let_in()

    def _forget(self, waiter: Waiter) -> None:
        """The caller has gone while it waited, or in the very moment its turn came or it was sent away."""
        turn = waiter.turn
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self._leave(waiter.flow, waiter.slots)
        elif self._admission.give_up(waiter):
            self._let_in()

    def _refused(self, error: PlaitError, rank: int) -> PlaitError:
        self._metrics.refused.labels(error.reason, PRIORITIES[rank]).inc()
        return error

    def _flow(self, rank: int, tenant: str) -> Flow:
        """Return the flow of a tenant; those that are not in the registry share one, or names could grow the state."""
        return self._flows[rank].get(tenant) or self._others[rank]

    def _lowered(self, flow: Flow, metadata: Sequence[tuple[str, str | bytes]]) -> Flow:
        """Return the flow of the class that the caller asks for; only a lower one than its route's is heard. Looked for only where it matters."""
        asked = next((str(value) for key, value in metadata if key == _PRIORITY), "")
        rank = PRIORITIES.index(asked) if asked in PRIORITIES else 0
        return flow if rank <= flow.rank else self._flow(rank, flow.tenant)

    def _same_flow(self, rank: int, tenant: Tenant) -> Flow:
        """Return the flow a tenant had, if its weight is still the same: what is under way stays counted."""
        known = self._flows[rank].get(tenant.name)
        return known if known is not None and known.weight == tenant.weight else Flow(rank, tenant.name, tenant.weight)

    def _line(self, arm: Arm) -> Line:
        return self._costs.line(arm.model, arm.version, _columns(arm))

    def _too_late(self) -> DeadlineExceeded:
        floor_ms = self._settings.min_budget_s * 1e3
        return DeadlineExceeded(
            f"less than {floor_ms:g} ms of the deadline was left, too little to answer in: allow the call more time",
            reason="BUDGET_TOO_SMALL",
        )

    def _too_costly(self, rows: int, arm: Arm) -> ResourceExhausted:
        return ResourceExhausted(
            f"{rows} candidates with {_columns(arm)} values each are more than the {self._settings.max_cells} values one request may ask for: "
            "send fewer candidates at a time",
            reason="REQUEST_TOO_COSTLY",
        )


def _columns(arm: Arm) -> int:
    """Return how many values the inputs of an arm hold for one row."""
    return sum(math.prod(item.spec.shape[1:]) for item in arm.inputs if item.per_row)


def _send_away(waiter: Waiter, error: Exception) -> None:
    if not waiter.turn.done():
        waiter.turn.set_exception(error)
