"""What other teams import to call plait: `RankingClient` (asyncio) and `SyncRankingClient` (threads), the same in all but waiting.

It needs grpcio, protobuf and googleapis-common-protos, and nothing else of plait but its errors and the router's stubs, so that it fits
into anybody's service beside anybody's numpy, pydantic or Triton client.

    async with RankingClient("rank.internal:443", api_key=key, tls=True) as client:
        ranking = await client.rank("home", "user-42", ["listing-7", "listing-8"], top_k=1)
    best = ranking.item_ids[0]
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import operator
import os
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message

from plait import dtypes
from plait.api.events.v1 import events_pb2
from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1.router_service_pb2_grpc import RouterServiceStub
from plait.api.types.v1 import types_pb2
from plait.errors import Cancelled, FailedPrecondition, Internal, InvalidArgument, PlaitError, Unavailable, Violation, from_rpc_error

__all__ = [
    "AgeReport",
    "Assignment",
    "AttemptReport",
    "Explanation",
    "FeatureReport",
    "Outcome",
    "Prediction",
    "Ranking",
    "RankingClient",
    "Recorded",
    "RuleReport",
    "StageReport",
    "SyncRankingClient",
    "Tensor",
    "TierReport",
    "Timings",
    "TlsConfig",
    "WrongOutcome",
]

Id = str | int | tuple[str | int, ...]
Ids = Iterable[str] | Iterable[int] | Iterable[tuple[str | int, ...]]
Pem = bytes | str | os.PathLike[str]

_BACKOFF_S: Final = 0.05  # ceiling of the first pause; it doubles with each try
_MAX_BACKOFF_S: Final = 1.0
_MIB: Final = 1024 * 1024
_FORMATS: Final = {**dict.fromkeys("efd", "float"), **dict.fromkeys("bhilqn", "int"), **dict.fromkeys("BHILQN", "uint")}
_CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", 20_000),  # a connection that died without a word is found out before a call has to
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # retries are decided here, where the budget and RetryInfo are known
    ("grpc.service_config_disable_resolution", 1),  # no TXT lookup beside every resolution
    ("grpc.lb_policy_name", "round_robin"),  # several routers behind one name share the calls
)
_OUTCOME_TYPES: Final = {name.removeprefix("EVENT_TYPE_").lower(): number for name, number in events_pb2.EventType.items() if number}
_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Whom to trust, and who we are: each PEM given as bytes, or as the path of a file.

    Without `root_ca` the system's roots are trusted. `cert` and `key` are for mutual TLS. `server_name` is the name the server's
    certificate must hold where that is not the host in the address (a port-forward, for example).
    """

    root_ca: Pem | None = None
    cert: Pem | None = None
    key: Pem | None = field(default=None, repr=False)
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense tensor: row-major, little-endian, packed. `dtype` is a numpy name such as "float32".

    Goes in and out without numpy, and meets it without a copy: `numpy.asarray(tensor)` is a read-only array on `data`. numpy has no
    bfloat16: such a tensor is an array of 2-byte voids, which nobody can take for numbers; with the package ml_dtypes
    `numpy.asarray(tensor).view(ml_dtypes.bfloat16)` has the values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, name: str, values: Any) -> Tensor:
        """Return a tensor of whatever has a buffer of numbers: a numpy array (of ml_dtypes.bfloat16, too), an array.array, a memoryview.

        Raises InvalidArgument.

        Example:  Tensor.of("user", numpy.zeros((1, 80), numpy.float32))
        """
        narrow = getattr(getattr(values, "dtype", None), "name", "") == "bfloat16"  # no format of a buffer means that: its bits travel
        try:
            view = memoryview(values.view("<u2") if narrow else values)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"tensor {name!r}: {type(values).__name__} holds no array of numbers; give a numpy array") from error
        code = view.format.lstrip("@=<")
        dtype = "bfloat16" if narrow else "bool" if code == "?" else f"{_FORMATS.get(code, '?')}{8 * view.itemsize}"
        if dtype not in dtypes.BY_NAME:
            raise InvalidArgument(f"tensor {name!r}: elements of the format {view.format!r} cannot be sent; give little-endian numbers")
        return cls(name, dtype, tuple(view.shape or ()), view.tobytes())

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What numpy.asarray reads (version 3 of the array interface protocol)."""
        known = dtypes.BY_NAME[self.dtype]
        if not known.size_bytes:
            raise TypeError(f"tensor {self.name!r}: elements of variable length are no numpy array")
        typestr = "|V2" if self.dtype == "bfloat16" else known.numpy  # the same whether or not somebody has imported ml_dtypes
        return {"version": 3, "shape": self.shape, "typestr": typestr, "data": self.data}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in microseconds, as measured by the router; the fields are explained in router_service.proto."""

    total_us: int
    resolve_us: int
    features_us: int
    store_us: int
    predict_us: int
    queue_us: int
    compute_us: int
    order_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureReport:
    """How many rows of one feature view were found, and how."""

    feature_view: str
    rows: int
    present: int
    null: int
    defaulted: int
    not_found: int
    stale: int
    timed_out: int
    unavailable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The variant a unit was given by an experiment, and its bucket in the layer; by the weights of the route where `experiment` is empty."""

    experiment: str
    layer: str
    variant: str
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Candidates in order: `item_ids` and `scores` are parallel, best first.

    `degraded_reasons` is empty when the answer is the best possible one; `tier` is the rung of the route's ladder that answered, and
    `revision` the registry's. `timings` and `feature_report` are there only when asked for with `explain`.
    `cache`: how a route that keeps answers came by this one (miss, hit, stale, shared, partial or repeated), "" where it was not asked;
    `age_s` is how old it, or the oldest score in it, is.
    """

    item_ids: list[str] | list[int] | list[tuple[str | int, ...]]
    scores: list[float]
    model: str
    version: str
    variant: str
    request_id: str
    degraded_reasons: tuple[str, ...]
    tier: str
    revision: int
    timings: Timings | None
    feature_report: tuple[FeatureReport, ...]
    assignments: tuple[Assignment, ...] = ()
    cache: str = ""
    age_s: float = 0.0

    @property
    def items(self) -> tuple[tuple[Id, float], ...]:
        """Pairs of id and score, best first; made anew at each call."""
        return tuple(zip(self.item_ids, self.scores, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Output tensors by name; the rest as in Ranking."""

    outputs: Mapping[str, Tensor]
    model: str
    version: str
    variant: str
    request_id: str
    degraded_reasons: tuple[str, ...]
    revision: int
    timings: Timings | None
    feature_report: tuple[FeatureReport, ...]
    tier: str = "full"
    assignments: tuple[Assignment, ...] = ()
    cache: str = ""
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleReport:
    """Why one rule did or did not decide; the fields of the reports are explained in explanation.proto."""

    rule: str
    matched: bool
    failed_condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """Why one tier of the ladder did or did not answer; microseconds."""

    tier: str
    answered: bool
    reason: str
    budget_us: int
    expected_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What one stage of a cascade did; `by_rule` counts what each rule removed, moved or boosted."""

    stage: str
    candidates_in: int
    candidates_out: int
    took_us: int
    by_rule: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """One call to a service behind the router."""

    what: str
    endpoint: str
    kind: str
    outcome: str
    took_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgeReport:
    """How old the rows of one view were, microseconds; -1 where there was none."""

    feature_view: str
    view_version: int
    oldest_us: int
    median_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A ranking and how it came to be, in the order things happened.

    `cache` says what a cache would have done: "unspecified" (it took no part), "miss", "hit", "stale", "shared", "partial" or "repeated".
    `not_in`: which experiments the unit is not in, and why. `summary` is one sentence for people.
    """

    ranking: Ranking
    summary: str
    rules: tuple[RuleReport, ...]
    not_in: Mapping[str, str]
    cache: str
    ages: tuple[AgeReport, ...]
    tiers: tuple[TierReport, ...]
    stages: tuple[StageReport, ...]
    attempts: tuple[AttemptReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one item of an answer, or with no `item` of the answer as a whole.

    `request_id`: the answer's. `type`: "view", "like", "add_to_cart", "make_offer", "start_purchase", "complete_purchase" or "rate".
    `at_s`: when, seconds since the epoch; None = now. `value`: a price, a rating, a duration. `outcome_id` tells outcomes apart that are alike
    in answer, item and type, for example the third click on an item.
    """

    request_id: str
    type: str
    item: Id | None = None
    entity_type: str = "item"
    at_s: float | None = None
    value: float = 0.0
    outcome_id: str = ""
    route: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongOutcome:
    """An outcome that was not kept: its place among those told, a stable word, and what to do about it."""

    index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What became of outcomes: how many were new, how many were known, and which are wrong."""

    accepted: int
    duplicates: int
    errors: tuple[WrongOutcome, ...] = ()


class _Client:
    """What both clients share: all but waiting. `_io` is the flavour of gRPC."""

    _io: ClassVar[Any]

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: bool | TlsConfig | None = None,
        insecure: bool = False,
        timeout_s: float = 5.0,
        retries: int = 2,
        max_message_bytes: int = 16 * _MIB,
    ) -> None:
        """Check everything; nothing is sent before the first call.

        `address` is host:port or a gRPC target. `tls`: True trusts the system's roots. `api_key` travels over TLS or loopback only,
        unless `insecure` says that the way is safe otherwise (a service mesh). `timeout_s` is the budget of a call that names none,
        `retries` how often a call is tried again within it. Raises InvalidArgument.
        """
        _check_address(address)
        _check_timeout(timeout_s)
        if retries < 0 or max_message_bytes <= 0:
            raise InvalidArgument("retries must not be negative, and max_message_bytes must be over 0")
        config = TlsConfig() if tls is True else tls or None
        if config and insecure:
            raise InvalidArgument("insecure means plain text: give either tls or insecure, not both")
        loopback = _is_loopback(address)
        if api_key and not (config or insecure or loopback):
            message = f"the API key would travel to {address} in plain text: use TLS, or say insecure if a service mesh encrypts the way"
            raise InvalidArgument(message, reason="API_KEY_EXPOSED")
        if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise InvalidArgument("the API key holds characters that cannot be sent: does it end in a line feed?")
        self._address = address
        self._timeout_s = timeout_s
        self._retries = retries
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._tls = _read(config) if config else None
        self._options = [
            *_CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.use_local_subchannel_pool", 1),  # one client, one connection: closing it closes that
        ]
        if loopback:
            self._options.append(("grpc.enable_http_proxy", 0))  # gRPC would take what stays here to the proxy named in http_proxy
        if config and config.server_name:
            self._options.append(("grpc.ssl_target_name_override", config.server_name))
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._channel: Any = None
        self._stub: Any = None

    def __repr__(self) -> str:
        how = "tls" if self._tls else "plaintext"
        return f"<{type(self).__name__} {self._address} {how} in_flight={self._in_flight}>"

    def _ready(self) -> Any:
        """Return the stub; the channel is opened by the first call, in the event loop and (after a fork) the process that use it."""
        with self._lock:
            if self._closed.is_set():
                raise FailedPrecondition(f"this client of {self._address} is closed", reason="CLIENT_CLOSED")
            if self._stub is None:
                if self._tls:
                    credentials = grpc.ssl_channel_credentials(*self._tls)
                    self._channel = self._io.secure_channel(self._address, credentials, options=self._options)
                else:
                    self._channel = self._io.insecure_channel(self._address, options=self._options)
                self._stub = RouterServiceStub(self._channel)
            return self._stub

    def _tries(self, timeout_s: float | None) -> _Tries:
        if timeout_s is None:
            return _Tries(self._timeout_s, self._retries)
        _check_timeout(timeout_s)
        return _Tries(timeout_s, self._retries)

    def _cancelled(self) -> Cancelled:
        return Cancelled(f"the client of {self._address} was closed while the call was under way", reason="CLIENT_CLOSED")


class RankingClient(_Client):
    """Ranks and predicts through a router, for asyncio and uvloop; to be shared by all tasks of one event loop.

    Every failure is a `plait.errors.PlaitError`. Where the router could not be reached or said UNAVAILABLE the call is tried again within
    its budget; calls only read, so that is safe.

        async with RankingClient("localhost:8080", api_key=key) as client:
            ranking = await client.rank("home", "user-42", ["listing-7", "listing-8"])
    """

    _io: ClassVar[Any] = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; calls under way fail with Cancelled, later ones with FailedPrecondition. Closing again does nothing."""
        self._closed.set()
        if self._channel is not None:
            await self._channel.close()

    async def rank(
        self,
        route: str,
        subject: Id,
        candidates: Ids,
        *,
        top_k: int = 0,
        request_id: str = "",
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Return the candidates in the order of the route's model, for one subject.

        Ids are all str, all int (64 bits) or all tuples of such, as the route's entity types declare; 1 to 10 000 distinct candidates.
        `top_k`: how many to answer, 0 = all. `inline_features` replace whole model inputs of the same name; `request_features` are what the
        model's feature set declares to be sent along, one value each or one per candidate. `labels` are what the route's rules and
        experiments may look at, for example the country. `explain` adds timings and a feature report.
        `request_id` (at most 128 bytes) is made up when empty, and the same on every try. `timeout_s` bounds all tries together.

        Raises PlaitError: InvalidArgument, NotFound (ROUTE_NOT_FOUND), FailedPrecondition, Unauthenticated, PermissionDenied,
        ResourceExhausted (`retry_after_s` says when to come back; not tried again), DeadlineExceeded, Unavailable.

        Example:  ranking = await client.rank("home", "user-42", ["listing-7", "listing-8"], top_k=1)
        """
        return _ranking(
            await self._call(
                "Rank",
                _rank_request(route, subject, candidates, top_k, request_id, inline_features, request_features, labels, explain),
                timeout_s,
            )
        )

    async def explain(
        self,
        route: str,
        subject: Id,
        candidates: Ids,
        *,
        top_k: int = 0,
        request_id: str = "",
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Explanation:
        """Return what `rank` would, and how it came to be; it is no exposure of an experiment. Arguments and errors as of `rank`.

        Example:  print((await client.explain("home", "user-42", ["listing-7", "listing-8"])).summary)
        """
        asked = _rank_request(route, subject, candidates, top_k, request_id, inline_features, request_features, labels, explain=True)
        return _explanation(await self._call("Explain", pb.ExplainRequest(rank=asked), timeout_s))

    async def predict(
        self,
        route: str,
        entities: Mapping[str, Ids],
        *,
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        outputs: Iterable[str] = (),
        request_id: str = "",
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Return the outputs of the route's model for rows of entities: the general form.

        `entities` maps an entity type to the ids of its rows; it may be empty when every input is given inline. `outputs` names those
        wanted, none = all. The rest, and the errors, as in `rank`.

        Example:  scores = numpy.asarray((await client.predict("fraud", {"payment": [17]})).outputs["score"])
        """
        return _prediction(
            await self._call(
                "Predict",
                _predict_request(route, entities, inline_features, request_features, labels, outputs, request_id, explain),
                timeout_s,
            )
        )

    async def invalidate_cache(
        self, *, route: str = "", model: str = "", entity_type: str = "", items: Ids = (), timeout_s: float | None = None
    ) -> None:
        """Have every router forget what it keeps of a route, of a model, or about items (at most 1 000 of one entity type).

        For what changed before a kept answer runs out: something was sold, or is wrong. Needs a key with the scope `operate`. Forgetting
        twice does no harm, so it is tried again like any call. Raises PlaitError: InvalidArgument, PermissionDenied, Unavailable
        (INVALIDATION_NOT_SHARED: not every router could be told).

        Example:  await client.invalidate_cache(entity_type="item", items=["listing-7"])
        """
        await self._call("InvalidateCache", _invalidation(route, model, entity_type, items), timeout_s)

    async def record_outcomes(self, outcomes: Iterable[Outcome], *, timeout_s: float | None = None) -> Recorded:
        """Tell what became of answers, 1 to 1 000 at once. Each counts once however often it is told, so tell again whatever you are not sure of.

        Raises PlaitError: InvalidArgument, FailedPrecondition (OUTCOMES_NOT_KEPT), Unavailable. Outcomes that are wrong each are in `errors`,
        the others are kept.

        Example:  await client.record_outcomes([Outcome(request_id=ranking.request_id, type="like", item="listing-7")])
        """
        return _recorded(await self._call("RecordOutcome", _outcomes_request(outcomes), timeout_s))

    async def _call(self, method: str, request: Message, timeout_s: float | None) -> Any:
        tries = self._tries(timeout_s)
        self._in_flight += 1
        try:
            while True:
                call = getattr(self._ready(), method)
                try:
                    return await call(request, timeout=tries.left_s(), metadata=self._metadata)
                except grpc.RpcError as error:
                    failure = from_rpc_error(error) if self._closed.is_set() else _failure(error)
                    pause_s = tries.pause_s(failure)
                    if pause_s is None:
                        raise failure from error
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if self._closed.is_set() and task and not task.cancelling():
                        raise self._cancelled() from None
                    raise
                await asyncio.sleep(pause_s)
        finally:
            self._in_flight -= 1


class SyncRankingClient(_Client):
    """RankingClient for code without an event loop; to be shared by all threads of one process.

    with SyncRankingClient("localhost:8080", api_key=key) as client:
        ranking = client.rank("home", "user-42", ["listing-7", "listing-8"])
    """

    _io: ClassVar[Any] = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls under way fail with Cancelled, later ones with FailedPrecondition. Closing again does nothing."""
        with self._lock:
            self._closed.set()
        if self._channel is not None:
            self._channel.close()

    def rank(
        self,
        route: str,
        subject: Id,
        candidates: Ids,
        *,
        top_k: int = 0,
        request_id: str = "",
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> Ranking:
        """Do what RankingClient.rank does, and wait for it."""
        return _ranking(
            self._call(
                "Rank",
                _rank_request(route, subject, candidates, top_k, request_id, inline_features, request_features, labels, explain),
                timeout_s,
            )
        )

    def explain(
        self,
        route: str,
        subject: Id,
        candidates: Ids,
        *,
        top_k: int = 0,
        request_id: str = "",
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Explanation:
        """As RankingClient.explain, waiting."""
        asked = _rank_request(route, subject, candidates, top_k, request_id, inline_features, request_features, labels, explain=True)
        return _explanation(self._call("Explain", pb.ExplainRequest(rank=asked), timeout_s))

    def predict(
        self,
        route: str,
        entities: Mapping[str, Ids],
        *,
        inline_features: Iterable[Tensor] = (),
        request_features: Iterable[Tensor] = (),
        labels: Mapping[str, str] | None = None,
        outputs: Iterable[str] = (),
        request_id: str = "",
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Do what RankingClient.predict does, and wait for it."""
        return _prediction(
            self._call(
                "Predict",
                _predict_request(route, entities, inline_features, request_features, labels, outputs, request_id, explain),
                timeout_s,
            )
        )

    def invalidate_cache(
        self, *, route: str = "", model: str = "", entity_type: str = "", items: Ids = (), timeout_s: float | None = None
    ) -> None:
        """Do what RankingClient.invalidate_cache does, and wait for it."""
        self._call("InvalidateCache", _invalidation(route, model, entity_type, items), timeout_s)

    def record_outcomes(self, outcomes: Iterable[Outcome], *, timeout_s: float | None = None) -> Recorded:
        """Do what RankingClient.record_outcomes does, and wait for it."""
        return _recorded(self._call("RecordOutcome", _outcomes_request(outcomes), timeout_s))

    def _call(self, method: str, request: Message, timeout_s: float | None) -> Any:
        tries = self._tries(timeout_s)
        self._count(1)
        try:
            while True:
                call = getattr(self._ready(), method)
                try:
                    return call(request, timeout=tries.left_s(), metadata=self._metadata)
                except grpc.RpcError as error:
                    failure = self._cancelled() if self._closed.is_set() else _failure(error)
                    pause_s = tries.pause_s(failure)
                    if pause_s is None:
                        raise failure from error
                except ValueError as error:
                    if self._closed.is_set():  # by another thread, between the last two lines
                        raise self._cancelled() from error
                    raise
                self._closed.wait(pause_s)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._in_flight += change


class _Tries:
    """One budget of time over all tries of a call."""

    __slots__ = ("_failed", "_give_up", "_retries")

    def __init__(self, timeout_s: float, retries: int) -> None:
        self._give_up = time.monotonic() + timeout_s
        self._retries = retries
        self._failed = 0

    def left_s(self) -> float:
        """Return what is left of the budget."""
        return max(0.0, self._give_up - time.monotonic())

    def pause_s(self, failure: PlaitError) -> float | None:
        """Return how long to wait before the next try, or None if there is none."""
        self._failed += 1
        if not isinstance(failure, Unavailable) or self._failed > self._retries:
            return None
        pause = backoff_s(self._failed, failure.retry_after_s, random.random())  # noqa: S311  (no secret)
        return pause if pause < self.left_s() else None


def backoff_s(failed: int, retry_after_s: float | None, chance: float) -> float:
    """Return the pause after `failed` tries, seconds: exponential with full jitter, on top of what the server asks for.

    `chance` is uniform in [0, 1). Callers that were refused together are told the same `retry_after_s`; the jitter keeps them from coming
    back together. Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    ceiling = min(_MAX_BACKOFF_S, _BACKOFF_S * 2.0 ** (failed - 1))
    return (retry_after_s or 0.0) + chance * ceiling


def _rank_request(
    route: str,
    subject: Id,
    candidates: Ids,
    top_k: int,
    request_id: str,
    inline_features: Iterable[Tensor],
    request_features: Iterable[Tensor],
    labels: Mapping[str, str] | None,
    explain: bool,
) -> pb.RankRequest:
    with _sendable():
        request = pb.RankRequest(route=route, top_k=top_k, request_id=request_id or str(uuid.uuid4()), explain=explain, labels=labels)
        request.inline_features.extend(map(_tensor_message, inline_features))
        request.request_features.extend(map(_tensor_message, request_features))
    _fill(request.subject, [subject], "subject")
    _fill(request.candidates, candidates, "candidates")
    return request


def _predict_request(
    route: str,
    entities: Mapping[str, Ids],
    inline_features: Iterable[Tensor],
    request_features: Iterable[Tensor],
    labels: Mapping[str, str] | None,
    outputs: Iterable[str],
    request_id: str,
    explain: bool,
) -> pb.PredictRequest:
    with _sendable():
        request = pb.PredictRequest(
            route=route, outputs=outputs, request_id=request_id or str(uuid.uuid4()), explain=explain, labels=labels
        )
        request.inline_features.extend(map(_tensor_message, inline_features))
        request.request_features.extend(map(_tensor_message, request_features))
        for entity_type, ids in entities.items():
            _fill(request.entities.add(entity_type=entity_type).ids, ids, f"entities[{entity_type!r}]")
    return request


def _invalidation(route: str, model: str, entity_type: str, items: Ids) -> pb.InvalidateCacheRequest:
    with _sendable():
        request = pb.InvalidateCacheRequest(route=route, model=model)
        if entity_type:
            request.items.entity_type = entity_type
    if entity_type or items:
        _fill(request.items.ids, items, "items.ids")
    return request


def _outcomes_request(outcomes: Iterable[Outcome]) -> pb.RecordOutcomeRequest:
    request = pb.RecordOutcomeRequest()
    for index, outcome in enumerate(outcomes):
        number = _OUTCOME_TYPES.get(outcome.type)
        if number is None:
            raise InvalidArgument(f"outcomes[{index}].type: expected one of {', '.join(_OUTCOME_TYPES)}", reason="OUTCOME_TYPE_UNKNOWN")
        with _sendable():
            message = request.outcomes.add(
                request_id=outcome.request_id, type=number, value=outcome.value, outcome_id=outcome.outcome_id, route=outcome.route
            )
            message.event_time.FromNanoseconds(round((time.time() if outcome.at_s is None else outcome.at_s) * 1e9))
            if outcome.item is not None:
                message.item.entity_type = outcome.entity_type
        if outcome.item is not None:
            _fill(message.item.ids, [outcome.item], f"outcomes[{index}].item")
    return request


def _recorded(response: pb.RecordOutcomeResponse) -> Recorded:
    wrong = (WrongOutcome(index=error.index, reason=error.reason, message=error.message) for error in response.errors)
    return Recorded(accepted=response.accepted, duplicates=response.duplicates, errors=tuple(wrong))


@contextmanager
def _sendable() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the request cannot be sent: {error}") from error


def _fill(message: types_pb2.EntityIds, ids: Iterable[Id], name: str) -> None:
    """Put ids of one kind into a message; the first one says which kind."""
    if isinstance(ids, str | bytes):
        raise _wrong_ids(name, "is one text, not a list of ids")
    try:
        values: list[Any] = list(ids)
        if values and isinstance(values[0], str):
            message.string_ids.extend(values)
        elif values and isinstance(values[0], tuple):
            message.composite_ids.extend(map(_composite, values))
        else:
            message.int64_ids.extend(values)
    except (TypeError, ValueError) as error:
        raise _wrong_ids(name, "must be all str, all int of 64 bits, or all tuples of such") from error


def _composite(parts: object) -> types_pb2.CompositeKey:
    if not isinstance(parts, tuple):
        raise TypeError("not a tuple")
    return types_pb2.CompositeKey(parts=[_part(part) for part in parts])


def _part(part: Any) -> types_pb2.KeyPart:
    if isinstance(part, str):
        return types_pb2.KeyPart(string_part=part)
    if isinstance(part, bool):
        raise TypeError("not an id")
    return types_pb2.KeyPart(int64_part=operator.index(part))


def _wrong_ids(name: str, description: str) -> InvalidArgument:
    return InvalidArgument("the ids cannot be sent", violations=[Violation(name, description)])


def _failure(error: grpc.RpcError) -> PlaitError:
    """Return what a call that nobody here cancelled failed with.

    A gRPC server that shuts down cancels the calls that had arrived and not begun, which is worth trying again like an UNAVAILABLE.
    """
    failure = from_rpc_error(error)
    if isinstance(failure, Cancelled):
        return Unavailable("the router ended the call before it answered: retry", reason="CONNECTION_LOST", retry_after_s=0.05)
    return failure


def _ids(message: types_pb2.EntityIds) -> list[str] | list[int] | list[tuple[str | int, ...]]:
    if message.composite_ids:
        return [tuple(p.int64_part if p.HasField("int64_part") else p.string_part for p in key.parts) for key in message.composite_ids]
    return message.string_ids[:] or message.int64_ids[:]  # a slice is a list, made a third faster than by list()


def _tensor_message(tensor: Tensor) -> types_pb2.Tensor:
    known = dtypes.BY_NAME.get(tensor.dtype)
    if known is None:
        raise ValueError(f"tensor {tensor.name!r} has no known dtype: {tensor.dtype!r}")
    return types_pb2.Tensor(name=tensor.name, dtype=types_pb2.DataType.ValueType(known.number), shape=tensor.shape, data=tensor.data)


def _tensor(message: types_pb2.Tensor) -> Tensor:
    known = dtypes.BY_NUMBER.get(message.dtype)
    if known is None:
        raise Internal(f"output {message.name!r} has element type {message.dtype}, which this client does not know; update plait")
    return Tensor(message.name, known.name, tuple(message.shape), message.data)


def _ranking(answer: pb.RankResponse) -> Ranking:
    return Ranking(
        item_ids=_ids(answer.item_ids),
        scores=answer.scores[:],
        model=answer.model,
        version=answer.model_version,
        variant=answer.variant,
        request_id=answer.request_id,
        degraded_reasons=tuple(answer.degraded_reasons),
        tier=answer.tier,
        revision=answer.registry_revision,
        timings=_same(Timings, answer.timings) if answer.HasField("timings") else None,
        feature_report=tuple(_same(FeatureReport, view) for view in answer.feature_report),
        assignments=tuple(_same(Assignment, given) for given in answer.assignments),
        cache=_cache(answer.cache),
        age_s=answer.age_us / 1e6,
    )


def _cache(status: explanation_pb2.CacheStatus.ValueType) -> str:
    word = explanation_pb2.CacheStatus.Name(status) if status in explanation_pb2.CacheStatus.values() else ""
    return word.removeprefix("CACHE_STATUS_").lower() if status else ""


def _prediction(answer: pb.PredictResponse) -> Prediction:
    return Prediction(
        outputs={tensor.name: _tensor(tensor) for tensor in answer.outputs},
        model=answer.model,
        version=answer.model_version,
        variant=answer.variant,
        request_id=answer.request_id,
        degraded_reasons=tuple(answer.degraded_reasons),
        tier=answer.tier,
        revision=answer.registry_revision,
        timings=_same(Timings, answer.timings) if answer.HasField("timings") else None,
        feature_report=tuple(_same(FeatureReport, view) for view in answer.feature_report),
        assignments=tuple(_same(Assignment, given) for given in answer.assignments),
        cache=_cache(answer.cache),
        age_s=answer.age_us / 1e6,
    )


def _explanation(answer: pb.ExplainResponse) -> Explanation:
    return Explanation(
        ranking=_ranking(answer.rank),
        summary=answer.summary,
        rules=tuple(_same(RuleReport, report) for report in answer.rules),
        not_in=dict(answer.not_in),
        cache=explanation_pb2.CacheStatus.Name(answer.cache_would_be).removeprefix("CACHE_STATUS_").lower(),
        ages=tuple(_same(AgeReport, report) for report in answer.ages),
        tiers=tuple(_same(TierReport, report) for report in answer.tiers),
        stages=tuple(
            StageReport(
                stage=report.stage,
                candidates_in=report.candidates_in,
                candidates_out=report.candidates_out,
                took_us=report.took_us,
                by_rule=dict(report.by_rule),
            )
            for report in answer.stages
        ),
        attempts=tuple(_same(AttemptReport, report) for report in answer.attempts),
    )


def _same(cls: type[_Part], message: Message) -> _Part:
    """Return a dataclass with the fields of a message of the same shape."""
    return cls(**{name: getattr(message, name) for name in cls.__slots__})  # type: ignore[attr-defined]


def _check_address(address: str) -> None:
    if not address or address.startswith(("http:", "https:")):
        raise InvalidArgument(f"{address!r} is no address of a router: give host:port, without http://")


def _check_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s < math.inf:
        raise InvalidArgument(f"timeout_s must be over 0 and finite, not {timeout_s}")


def _is_loopback(address: str) -> bool:
    """Say whether a gRPC target (doc/naming.md of gRPC) stays on this machine; where in doubt it does not."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    scheme, colon, rest = address.partition(":")
    if colon and scheme in {"dns", "ipv4", "ipv6"}:
        address = rest.rpartition("/")[2]
    return all(_is_loopback_host(host) for host in address.split(","))


def _is_loopback_host(address: str) -> bool:
    host = address if address.count(":") > 1 else address.partition(":")[0]  # several colons: IPv6
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _read(config: TlsConfig) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Return roots, key and certificate chain, as grpc.ssl_channel_credentials takes them."""
    if (config.cert is None) != (config.key is None):
        raise InvalidArgument("a client certificate and its key go together: give both cert and key")
    return _pem(config.root_ca), _pem(config.key), _pem(config.cert)


def _pem(pem: Pem | None) -> bytes | None:
    if pem is None or isinstance(pem, bytes):
        return pem
    try:
        return Path(pem).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"the TLS file {pem} cannot be read: {error.strerror}") from error
