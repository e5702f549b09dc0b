"""The endpoints of one service behind the router, as discovery finds them: each call goes to the best one, and elsewhere when that pays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import grpc

from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted, Unavailable
from plait.registry.policies import Hedge
from plait.rpc.deadline import Deadline
from plait.telemetry.logging import get_logger
from router.balancer import Balancer
from router.discovery.found import Found
from router.endpoints import Endpoint, Metadata, Open, Transport, takes_calls
from router.hedging import HedgeBudget, first_of
from router.latency import Latencies
from router.pool_metrics import PoolMetrics
from router.replica import Replica
from router.retry_budget import RetryBudget
from router.trail import Trail

log = get_logger(__name__)

# Not an answer to the call but the end of the stream it was on: gone, or it does not take us for a plait service.
_NOT_LET_IN: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
_OWN_FAULT: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_OF_THE_MODEL: Final = ("MODEL_LOADING", "MODEL_UNLOADING", "MODEL_QUARANTINED")  # say nothing of the endpoint, which serves others well
_TOO_LATE: Final = 3.0  # a call that took so many times what was expected, and ran out of time, is the endpoint's fault
_DRAIN_S: Final = 10.0  # an endpoint that is no longer found has so long to answer what it holds
_KEEP_S: Final = 10.0  # "nobody is there" is not believed for so long, while those that were there may still answer
_LOOK_S: Final = 1.0
_QUIET_S: Final = 5.0  # one that said it is about to stop gets nothing for so long; then it is gone, or another process has its address

Send = Callable[[Transport], Awaitable[Any]]
Elsewhere = Callable[[PlaitError], bool]


def lost(error: PlaitError) -> bool:
    """Whether the endpoint was not reached, as against having answered with an error."""
    return error.reason == "CONNECTION_LOST" or error.code in _NOT_LET_IN


def framed(frame: Any, plan: CallPlan) -> Send:
    """Return what sends a filled frame with `Connections.call`; it is serialized when sent, so that it may be sent again."""
    return lambda transport: transport.typed(frame, deadline=plan.deadline, tenant=plan.tenant, request_id=plan.request_id)


@dataclass(slots=True, kw_only=True)
class CallPlan:
    """What one call is about and how much it is worth. `rows`: how much work it is. `attempts`: calls in all, one after another. A `trail`
    learns of each, as one for `what`."""

    model: str = ""
    version: str = ""
    rows: int = 1
    deadline: Deadline
    tenant: str
    request_id: str
    metadata: Metadata = ()
    attempts: int = 2
    hedge: Hedge | None = None
    what: str = "model"
    trail: Trail | None = None


class Connections:
    """Endpoints by address, opened when found and closed, once they have answered, when found no more.

    `open_transport(address, on_load)` opens one. `name` is what logs call the service. `stateful`: calls depend on those before, so
    none is tried again.
    """

    def __init__(
        self,
        name: str,
        open_transport: Open,
        balancer: Balancer,
        *,
        stateful: bool = False,
        metrics: PoolMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._open = open_transport
        self._balancer = balancer
        self._stateful = stateful
        self._metrics = metrics
        self._clock = clock
        self._endpoints: dict[Replica, Endpoint] = {}
        self._by_address: dict[str, Endpoint] = {}
        self._held: dict[tuple[str, str], bool] = {}
        self._lagging: dict[tuple[str, str], tuple[Replica, ...]] = {}
        self._budget = RetryBudget()
        self._hedges = HedgeBudget()
        self._latencies = Latencies()
        self._closing: set[asyncio.Task[None]] = set()
        self._empty: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Connections {self._name} {list(self._balancer.replicas)}>"

    def adopt(self, found: frozenset[Found]) -> None:
        """Call these from now on. When suddenly nobody is found, those that were there are kept for ten seconds: more often than a whole
        service, it is the list of it that fails."""
        if self._empty is not None:
            self._empty.cancel()
            self._empty = None
        if not found and self._by_address:
            log.warning("no endpoint is found; those known are kept a while", service=self._name, for_s=_KEEP_S)
            self._empty = asyncio.get_running_loop().call_later(_KEEP_S, self._replace, found)
            return
        self._replace(found)

    def holds(self, model: str, version: str) -> bool:
        """Whether any endpoint has the version ready, as far as is known."""
        key = (model, version)
        held = self._held.get(key)
        if held is None:
            endpoints = self._by_address.values()
            held = self._held[key] = not endpoints or any(e.may_hold(model, version) for e in endpoints)
        return held

    def transports(self, model: str = "", version: str = "") -> list[Transport]:
        """Return every way to ask about a model, those that may hold it and take calls first."""
        endpoints = sorted(self._by_address.values(), key=lambda e: not (e.replica.accepts and (not model or e.may_hold(model, version))))
        return [endpoint.transport for endpoint in endpoints]

    def call(self, send: Send, plan: CallPlan, elsewhere: Elsewhere = lambda _: False) -> Coroutine[Any, Any, Any]:
        """Have `send` call the best endpoint's transport and return what it returns; a second call of it must not disturb the first.

        Tried again, on another endpoint where there is one, while attempts, deadline and the budget of retries allow it: where the endpoint
        was lost, and, where there is another, for an error that `elsewhere` says may not hold there. Raises the last error;
        Unavailable (POOL_UNAVAILABLE) where there is no endpoint at all.
        """
        if plan.hedge is None or self._stateful:
            return self._attempts(send, plan, elsewhere, [])
        return self._hedged(send, plan, plan.hedge, elsewhere)

    async def look(self) -> None:
        """Ask every endpoint which versions it holds ready. Those that do not say so within a second are unknown."""
        deadline = Deadline.after(_LOOK_S)
        endpoints = tuple(self._by_address.values())
        asked = (endpoint.transport.ready_versions(deadline) for endpoint in endpoints)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for endpoint, answer in zip(endpoints, answers, strict=True):
            if isinstance(answer, Exception) and not isinstance(answer, grpc.aio.UsageError):
                raise answer
            endpoint.ready = ready = None if isinstance(answer, BaseException) else answer  # (its channel was closed meanwhile)
            if ready is not None:
                self._balancer.reached(endpoint.replica)
            if endpoint.wanted and not endpoint.replica.accepts and self._clock() >= endpoint.quiet_until_s:
                endpoint.replica.accepts = True  # it said it was about to stop, and by now it has, or has not
                self._balancer.changed()
        self._forget()
        if self._metrics is not None:
            now_s = self._clock()
            replicas = self._balancer.replicas
            self._metrics.state(self._name, sum(r.in_flight for r in replicas), len(replicas), sum(r.avoided(now_s) for r in replicas))

    async def close(self) -> None:
        """Close every connection; calls still waiting fail."""
        if self._empty is not None:
            self._empty.cancel()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for endpoint in self._by_address.values():
            await endpoint.transport.close()

    async def drain(self) -> None:
        """Close every connection once it has answered what it holds, or after ten seconds."""
        self._replace(frozenset())
        await asyncio.gather(*self._closing)

    async def _attempts(self, send: Send, plan: CallPlan, elsewhere: Elsewhere, tried: list[Replica]) -> Any:
        attempts = 1 if self._stateful else plan.attempts
        while True:
            endpoint = self._pick(plan, tried)
            tried.append(endpoint.replica)
            attempts -= 1
            try:
                return await self._attempt(endpoint, send, plan, "first" if len(tried) == 1 else "retry")
            except PlaitError as error:
                if attempts < 1 or not self._again(error, plan, elsewhere, tried):
                    raise
            if self._metrics is not None:
                self._metrics.retried(self._name)

    def _again(self, error: PlaitError, plan: CallPlan, elsewhere: Elsewhere, tried: list[Replica]) -> bool:
        """Whether another attempt is worth it."""
        replica = self._balancer.pick(plan.rows, tried)
        if replica is None or not (lost(error) or (replica not in tried and elsewhere(error))):
            return False
        if not self._budget.allows:
            if self._metrics is not None:
                self._metrics.not_retried(self._name)
            return False
        left_s = plan.deadline.remaining_s()
        return left_s > 0 and left_s >= self._balancer.expected_s(replica, plan.rows)

    async def _hedged(self, send: Send, plan: CallPlan, hedge: Hedge, elsewhere: Elsewhere) -> Any:
        self._hedges.earn(hedge.share)
        key = (plan.model, plan.version)
        after_s = self._latencies.percentile(key, hedge.percentile)
        tried: list[Replica] = []
        first = self._timed(key, self._attempts(send, plan, elsewhere, tried))
        if after_s is None:
            return await first
        return await first_of(first, after_s, lambda: self._second(send, plan, tried))

    def _second(self, send: Send, plan: CallPlan, tried: list[Replica]) -> Coroutine[Any, Any, Any] | None:
        """Return a second call somewhere else, where it is allowed and there is such a place."""
        endpoint = self._pick(plan, tried)
        if endpoint.replica in tried or not endpoint.replica.accepts or not self._budget.allows:
            return None
        if plan.deadline.remaining_s() < self._balancer.expected_s(endpoint.replica, plan.rows) or not self._hedges.spend():
            return None
        tried.append(endpoint.replica)
        if self._metrics is not None:
            self._metrics.hedged(self._name)
        return self._attempt(endpoint, send, plan, "hedge")

    async def _timed(self, key: tuple[str, str], call: Coroutine[Any, Any, Any]) -> Any:
        """Learn how long first calls take; one that is cancelled, as the second was faster, took at least so long."""
        began_s = self._clock()
        try:
            answer = await call
        except asyncio.CancelledError:
            self._latencies.observe(key, self._clock() - began_s, began_s)
            raise
        self._latencies.observe(key, self._clock() - began_s, began_s)
        return answer

    def _pick(self, plan: CallPlan, tried: list[Replica] | tuple[()]) -> Endpoint:
        lagging = self._without(plan.model, plan.version) if plan.model else ()
        replica = self._balancer.pick(plan.rows, (*tried, *lagging) if tried or lagging else ())
        if replica is None:
            raise Unavailable(
                f"{self._name} has no endpoint: start one, or look at how they are found", reason="POOL_UNAVAILABLE", retry_after_s=1.0
            )
        return self._endpoints[replica]

    def _without(self, model: str, version: str) -> tuple[Replica, ...]:
        """Return those that do not hold a version, as far as is known."""
        key = (model, version)
        found = self._lagging.get(key)
        if found is None:
            found = tuple(e.replica for e in self._by_address.values() if not e.may_hold(model, version))
            self._lagging[key] = found
        return found

    async def _attempt(self, endpoint: Endpoint, send: Send, plan: CallPlan, kind: str) -> Any:
        replica, rows = endpoint.replica, plan.rows
        began_s = self._clock()
        replica.in_flight += 1
        try:
            response = await send(endpoint.transport)
        except (PlaitError, asyncio.CancelledError) as error:
            took_s = self._clock() - began_s
            if isinstance(error, PlaitError):
                self._blame(endpoint, error, took_s, rows)
            else:  # nobody waits any more: the caller has gone, or another endpoint was faster
                self._balancer.overdue(replica, took_s, rows)
            if plan.trail is not None:
                plan.trail.tried(plan.what, kind, endpoint.address, took_s, error)
            raise
        finally:
            replica.in_flight -= 1
            if endpoint.leaving is not None and not replica.in_flight:
                endpoint.leaving.set()
        took_s = self._clock() - began_s
        self._budget.succeeded()
        if plan.trail is not None:
            plan.trail.tried(plan.what, kind, endpoint.address, took_s, None)
        if self._balancer.answered(replica, took_s, rows):
            log.info("a replica answers again", service=self._name, replica=replica.name)
        return response

    def _blame(self, endpoint: Endpoint, error: PlaitError, took_s: float, rows: int) -> None:
        """Work out what a failure says of the endpoint."""
        replica, for_s = endpoint.replica, 0.0
        if lost(error):
            for_s = self._balancer.lost(replica)
            if error is not endpoint.loss:  # every call on a stream fails when it breaks; that is one failure
                endpoint.loss = error
                self._budget.failed()
        elif isinstance(error, ResourceExhausted):
            self._balancer.refused(replica)
        elif isinstance(error, DeadlineExceeded):
            expected_s = self._balancer.expected_s(replica, rows)
            if 0 < expected_s * _TOO_LATE < took_s:
                for_s = self._balancer.failed(replica)
            self._balancer.overdue(replica, took_s, rows)
        elif error.code in _OWN_FAULT and error.reason not in _OF_THE_MODEL:
            for_s = self._balancer.failed(replica)
            if isinstance(error, Unavailable):
                self._budget.failed()
        if for_s:
            log.warning("a replica is avoided", service=self._name, replica=replica.name, for_s=for_s, error=error.message)

    def _replace(self, found: frozenset[Found]) -> None:
        """Open what is new, close what is gone, and note who takes calls."""
        warm = not self._by_address
        listed = {one.address: one for one in found}
        for address in self._by_address.keys() - listed.keys():
            self._remove(self._by_address.pop(address))
        for address, one in sorted(listed.items()):
            endpoint = self._by_address.get(address) or self._add(one, warm=warm)
            endpoint.wanted = takes_calls(one)
            endpoint.replica.accepts = endpoint.wanted
            endpoint.replica.zone = one.zone
        self._forget()
        self._balancer.changed()

    def _forget(self) -> None:
        """Work out anew who holds what."""
        self._held.clear()
        self._lagging.clear()

    def _add(self, one: Found, *, warm: bool) -> Endpoint:
        replica = self._balancer.add(one.address, one.zone, warm=warm)
        endpoint = Endpoint(one.address, replica, self._open(one.address, lambda load: self._heard(endpoint, load)))
        self._endpoints[replica] = self._by_address[one.address] = endpoint
        return endpoint

    def _remove(self, endpoint: Endpoint) -> None:
        self._balancer.remove(endpoint.replica)
        task = asyncio.create_task(self._let_go(endpoint), name=f"let go of {endpoint.address}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _let_go(self, endpoint: Endpoint) -> None:
        endpoint.leaving = asyncio.Event()
        try:
            if endpoint.replica.in_flight:
                await asyncio.wait_for(endpoint.leaving.wait(), _DRAIN_S)
        except TimeoutError:
            log.warning("an endpoint that is gone had not answered all", service=self._name, replica=repr(endpoint))
        finally:
            self._endpoints.pop(endpoint.replica, None)
            await endpoint.transport.close()

    def _heard(self, endpoint: Endpoint, load: Any) -> None:
        """Take what an answer says of the endpoint's load."""
        now_s = self._clock()
        endpoint.replica.reported(load.in_flight, load.row_ns * 1e-9, now_s)
        if load.draining:
            endpoint.quiet_until_s = now_s + _QUIET_S
            endpoint.replica.accepts = False
            self._balancer.changed()
