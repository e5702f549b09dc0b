"""An inference on its way through: found by its name, sent to a worker, answered, with its tensors unread and its bytes untouched.

    authenticate (the server's interceptor) → read the name → knock → route's variant, or model → admit → worker → answer

The name is a route's, or else a model's: whoever speaks the Open Inference Protocol calls either as a model, and need not know which it is.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from prometheus_client import Counter

from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, NotFound, PermissionDenied
from plait.registry.records import EMPTY, Model, Signature, Snapshot
from plait.registry.references_of import models_of
from plait.rpc.call import Call
from plait.telemetry.metrics import Metrics
from router import wire
from router.choosing import Choice, Ready, choose, give_way
from router.connections import CallPlan
from router.gate import Gate
from router.pools import Pools
from router.route_table import Arm, RouteTable, ServingRoute
from router.rules import Facts

UNIT_HEADER: Final = "x-plait-unit"
_NEWEST: Final = ("", "-1")  # what clients say for "whichever is newest"; a worker knows which of those are ready
_CHAMPION: Final = "champion"
_MAX_REQUEST_ID_CHARS: Final = 128
_ROW_BYTES: Final = 320  # of a version whose signature is not known
_TEXT_BYTES: Final = 16
_ATTEMPTS: Final = 2
_SHOWN_CHARS: Final = 80


class Target(NamedTuple):
    """Where an inference goes. `version` "" leaves the choice to the worker. There is no `route`, nor a `variant`, where a model was named."""

    model: str
    version: str
    route: ServingRoute | None = None
    variant: str = ""

    @property
    def route_name(self) -> str:
        """Empty where there is none."""
        return self.route.name if self.route is not None else ""


class PassThrough:
    """Answers ModelInfer with bytes for bytes.

    `table` returns the routes of the newest snapshot; `adopt` takes its models.
    """

    def __init__(self, table: Callable[[], RouteTable], gate: Gate, workers: Pools, metrics: Metrics) -> None:
        self._table = table
        self._gate = gate
        self._workers = workers
        self._models: Mapping[str, Model] = EMPTY.models
        self._open_to: Mapping[str, frozenset[str]] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._counts: dict[tuple[str, str, str, str], Counter] = {}  # found once per snapshot: finding one costs more than counting
        self._passed = metrics.counter(
            "plait_router_inferences", "inferences answered by model version, and the route and variant that led to it, if any",
            ("route", "variant", "model", "version"),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<PassThrough models={len(self._models)} {self._gate!r}>"

    def adopt(self, snapshot: Snapshot) -> None:
        """Know the models of a new snapshot from the next request on."""
        self._models = snapshot.models
        self._open_to = _open_to(snapshot)
        self._rows = {}
        self._counts = {}

    async def infer(self, request: bytes, call: Call) -> bytes:
        """Return the serialized answer to a serialized ModelInferRequest.

        Raises InvalidArgument (MALFORMED_MESSAGE); NotFound (MODEL_NOT_FOUND, VERSION_NOT_FOUND); PermissionDenied (MODEL_NOT_OPEN); FailedPrecondition (ROUTE_NOT_RAW) and as
        `RouteTable.find` for a route that cannot serve it; as the gate and the workers do.
        """
        head = wire.head(request)
        self._gate.knock(call, head.model)
        target = self.find(head.model, head.version, call, head.id)
        if (target.model, target.version) != (head.model, head.version):
            request += wire.renaming(target.model, target.version)
        plan = CallPlan(
            model=target.model,
            version="" if target.version in _NEWEST else target.version,
            rows=1 + len(request) // self._row_bytes(target),
            deadline=call.deadline.at_most(target.route.timeout_s) if target.route is not None else call.deadline,
            tenant=call.tenant,
            request_id=call.request_id or head.id[:_MAX_REQUEST_ID_CHARS],
            metadata=call.metadata,
            attempts=target.route.attempts if target.route is not None else _ATTEMPTS,
            hedge=target.route.hedge if target.route is not None else None,
        )
        answer = await self._gate.infer(call, plan, target.route_name, lambda: self._workers.infer_raw(request, plan))
        self._count(target)
        return answer

    def find(self, name: str, version: str, call: Call, request_id: str = "") -> Target:
        """Return where an inference for this name and version goes. Raises as `infer`."""
        table = self._table()
        if name in table.routes:
            route = table.find(name, call.tenant)
            if route.stages is not None:
                raise FailedPrecondition(
                    f"route {name!r} has stages, which look at items that an inference does not name: call Rank, or a model by its name",
                    reason="ROUTE_NOT_RAW",
                )
            arm = _arm(route, version, call, request_id, self._workers.ready)
            return Target(arm.model, arm.version, route, arm.name)
        model = self._models.get(name)
        if model is None:
            shown = repr(name[:_SHOWN_CHARS]) if name else "its name is empty"
            raise NotFound(
                f"Request for unknown model: {shown}; 'plait get routes' and 'plait get models' list what can be asked for",
                reason="MODEL_NOT_FOUND",
            )
        if call.tenant not in self._open_to.get(name, (call.tenant,)):
            raise PermissionDenied(
                f"model {name!r} serves routes that are not open to the tenant of your key: ask the owner of one to add the tenant",
                reason="MODEL_NOT_OPEN",
            )
        return Target(name, _version(model, version))

    def _count(self, target: Target) -> None:
        labels = (target.route_name, target.variant, target.model, target.version)
        count = self._counts.get(labels)
        if count is None:
            count = self._counts[labels] = self._passed.labels(*labels)
        count.inc()

    def _row_bytes(self, target: Target) -> int:
        """Return how many bytes a row takes, about: how much work a request is, is told by its size, as nobody looks at its shapes."""
        key = (target.model, target.version)
        found = self._rows.get(key)
        if found is None:
            model = self._models.get(target.model)
            version = model.resolve(target.version) or model.versions[-1] if model is not None and model.versions else None
            found = self._rows[key] = row_bytes(version.signature) if version is not None and version.signature is not None else _ROW_BYTES
        return found


def row_bytes(signature: Signature) -> int:
    """Return what the inputs of one row take, those that are per request not counted; text is taken for 16 bytes."""
    sizes = (
        (BY_NAME[spec.dtype].size_bytes or _TEXT_BYTES) * abs(math.prod(spec.shape[1:])) for spec in signature.inputs if spec.per == "row"
    )
    return max(1, sum(sizes))


def _open_to(snapshot: Snapshot) -> Mapping[str, frozenset[str]]:
    """Return who may call a model by its name, where that is not everybody: those to whom a route that leads to it is open. A route that is
    closed would be a fence with a gap beside it otherwise."""
    found: dict[str, set[str] | None] = {}
    for route in snapshot.routes.values():
        for model in {model for model, _ in models_of(route)}:
            known = found.get(model, set())
            found[model] = None if known is None or not route.tenants else known | set(route.tenants)
    return {model: frozenset(tenants) for model, tenants in found.items() if tenants is not None}


def _arm(route: ServingRoute, version: str, call: Call, request_id: str, ready: Ready) -> Arm:
    if version in _NEWEST:
        return _assigned(route, call, request_id, ready)
    arm = next((arm for arm in route.by_name.values() if arm.version == version), None)
    if arm is None:
        has = ", ".join(arm.version for arm in route.by_name.values())
        raise NotFound(
            f"Request for unknown version {version[:_SHOWN_CHARS]!r} of route {route.name!r}: its variants are at {has}; leave the version out",
            reason="VERSION_NOT_FOUND",
        )
    return arm


def _version(model: Model, version: str) -> str:
    if version in _NEWEST:
        champion = model.resolve(_CHAMPION) if not version else None
        return champion.version if champion is not None else version
    found = model.resolve(version)
    if found is None:
        has = ", ".join(known.version for known in reversed(model.versions))
        raise NotFound(
            f"Request for unknown version {version[:_SHOWN_CHARS]!r} of model {model.name!r}; versions it has, newest first: {has}",
            reason="VERSION_NOT_FOUND",
        )
    return found.version


def _assigned(route: ServingRoute, call: Call, request_id: str, ready: Ready) -> Arm:
    """Return the variant by rules, experiments and weights. The subject is whom the caller names in a header, else each request by its id."""
    subject = next((str(value) for name, value in call.metadata if name == UNIT_HEADER), request_id or uuid.uuid4().hex)
    if route.plain:
        return give_way(route, subject, Choice(arm=route.assign(subject)), ready).arm
    facts = Facts(
        tenant=call.tenant,
        metadata=call.metadata,
        labels={},
        candidates=0,
        top_k=0,
        request_features=(),
        subject=subject,
        request_id=subject,
    )
    return give_way(route, subject, choose(route, facts), ready).arm
