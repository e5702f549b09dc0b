"""No id, no feature value and no secret is in a log line, a span, a metric or an error text: whatever is called, whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import grpc
import numpy as np
import pytest
from redis.asyncio import Redis
from tests.fakes import canaries
from tests.fakes.event_world import TYPES, feature
from tests.fakes.feast_repository import password_of
from tests.fakes.otlp_collector import OtlpCollector
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.feast.keys import EntityKeys, field_of, time_field_of
from feature_retrieval.row_codec import tenant_key
from plait.api.events.v1 import events_pb2
from plait.api.feast.serving import serving_service_pb2 as feast_pb
from plait.api.feast.serving import serving_service_pb2_grpc as feast_grpc
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.local.child import Child
from plait.local.readiness import until_ready
from plait.local.redis import EmbeddedRedis
from plait.registry.manifests import Manifest
from plait.registry.records import (
    Aggregation,
    Entity,
    FeastSource,
    Feature,
    FeatureSet,
    FeatureView,
    KeyPart,
    ModelInput,
    RequestFeature,
)
from plait.registry.store import Store

TOKEN: Final = "needletoken-of-the-services"
PRIVACY_KEY: Final = "needleprivacy-0123456789-0123456789"
WRONG: Final = "needlekey-that-nobody-has"
FEAST: Final = FeastSource(project="shop", view="drivers", join_keys=("driver_id",))
STATS = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    durable="before",
    features=(Feature(name="a", default=0), Feature(name="colour", dtype="string", vocabulary=("red",))),
)
PEOPLE = FeatureView(name="people", entity=Entity(type="user", key="int64"), features=(Feature(name="a", default=0),))
PARTS = (KeyPart(name="item", type="string"), KeyPart(name="user", type="int64"))
PAIRS = FeatureView(name="pairs", entity=Entity(type="pair", key="composite", parts=PARTS), features=(Feature(name="a", default=0),))
OTHERS = FeatureView(name="others", entity=Entity(type="item"), features=(Feature(name="a"),), readers=("nobody",), writers=("nobody",))
DRIVERS = FeatureView(name="drivers", entity=Entity(type="driver"), features=(Feature(name="a"),), feast=FEAST)
ACTIVITY = FeatureView(
    name="activity",
    entity=Entity(type="listing"),
    aggregation=Aggregation(entity_from="object", lateness_s=3600),
    features=(feature("views", "count", "view", default=0), feature("spent", "sum", "complete_purchase", value="value", default=0)),
)
ALL = FeatureSet(
    name="all",
    inputs=(
        ModelInput(name="item", entity="item", features=("stats:a", "stats:colour", "$request:budget")),
        ModelInput(name="user", entity="user", features=("people:a",)),
        ModelInput(name="pair", entity="pair", features=("pairs:a",)),
        ModelInput(name="listing", entity="listing", features=("activity:views", "activity:spent")),
    ),
    request=(RequestFeature(name="budget", minimum=0, maximum=100_000),),
)
SECRET_SET = FeatureSet(name="secret", inputs=(ModelInput(name="item", entity="item", features=("others:a",)),))
RIDES = FeatureSet(name="rides", inputs=(ModelInput(name="driver", entity="driver", features=("drivers:a",)),))
RECORDS = (STATS, PEOPLE, PAIRS, OTHERS, DRIVERS, ACTIVITY, ALL, SECRET_SET, RIDES)
PAIR = types_pb2.EntityIds(
    composite_ids=[
        types_pb2.CompositeKey(parts=[types_pb2.KeyPart(string_part=canaries.PART), types_pb2.KeyPart(int64_part=canaries.NUMBER)])
    ]
)
ITEM, USER = types_pb2.EntityIds(string_ids=[canaries.ID]), types_pb2.EntityIds(int64_ids=[canaries.NUMBER])
IDS: Final = {"item": ITEM, "user": USER, "pair": PAIR, "listing": ITEM}
SERVICE = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"]
FEAST_SERVICE = feast_pb.DESCRIPTOR.services_by_name["ServingService"]


def now_us() -> int:
    return int(time.time() * 1e6)


def rows(entity_type: str, ids: types_pb2.EntityIds) -> types_pb2.EntityRows:
    return types_pb2.EntityRows(entity_type=entity_type, ids=ids)


def budget(value: float) -> types_pb2.Tensor:
    return types_pb2.Tensor(name="budget", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1], data=np.float32(value).tobytes())


def asked(feature_set: str = "all", *, ids: Mapping[str, types_pb2.EntityIds] = IDS, sent: float = canaries.VALUE) -> pb.GetFeaturesRequest:
    entities = [rows(entity_type, given) for entity_type, given in ids.items()]
    return pb.GetFeaturesRequest(feature_set=feature_set, entities=entities, request_features=[budget(sent)], include_ages=True)


def batch(view: str, ids: types_pb2.EntityIds, *, at_us: int = 0, **more: Any) -> pb.FeatureBatch:
    made = pb.FeatureBatch(feature_view=view, ids=ids, event_times_us=[at_us or now_us()], **more)
    count = len(ids.string_ids) + len(ids.int64_ids) + len(ids.composite_ids)
    made.columns.add(features=["a"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.full(count, canaries.VALUE, np.float32).tobytes())
    if view == "stats":
        text = canaries.TEXT.encode()
        offsets = np.arange(count + 1, dtype="<u4") * len(text)
        made.columns.add(features=["colour"], dtype=types_pb2.DATA_TYPE_BYTES, data=text * count, offsets=offsets.tobytes())
    return made


def event(event_id: str, kind: str = "complete_purchase", *, at_us: int = 0, ids: types_pb2.EntityIds = ITEM) -> events_pb2.Event:
    made = events_pb2.Event(event_id=event_id, type=TYPES[kind], value=canaries.VALUE, object=rows("listing", ids))  # type: ignore[arg-type]
    made.subject.CopyFrom(rows("user", USER))
    made.event_time.FromMicroseconds(at_us or now_us())
    return made


@dataclasses.dataclass
class World:
    """The service, and every error text that came out of it."""

    address: str
    metrics: str
    log: Path
    key: str
    registry: Store
    redis: Redis
    redis_door: TcpProxy
    postgres_door: TcpProxy
    collector: OtlpCollector
    channel: grpc.aio.Channel
    secrets: Mapping[str, str]
    errors: list[str] = dataclasses.field(default_factory=list)

    @property
    def stub(self) -> Any:
        return pb_grpc.FeatureRetrievalServiceStub(self.channel)

    @property
    def feast(self) -> Any:
        return feast_grpc.ServingServiceStub(self.channel)

    @property
    def mine(self) -> Sequence[tuple[str, str]]:
        return (("authorization", f"Bearer {self.key}"), ("x-request-id", "r1"))

    async def good(self, call: Any) -> Any:
        """Return what a call answers, all answers of a stream; what it says of refused rows is looked through."""
        answers = [answer async for answer in call] if hasattr(call, "read") else [await call]
        for answer in answers:
            self.errors += [str(error) for error in getattr(answer, "errors", ())]
        return answers if hasattr(call, "read") else answers[0]

    async def refused(self, call: Any) -> str:
        """Return the status of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.good(call)
        error = caught.value
        self.errors += [str(error.details()), str(error.debug_error_string()), str(error.trailing_metadata())]
        return _code(error)

    async def told(self) -> dict[str, str]:
        """Return everything that was told, by where."""
        metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10).read().decode())
        spans = "\n".join(str(span) for _, span in self.collector.spans)
        return {"logs": self.log.read_text(), "metrics": metrics, "spans": spans, "errors": "\n".join(self.errors)}


@asynccontextmanager
async def world(redis: EmbeddedRedis, dsn: str, folder: Path) -> AsyncIterator[World]:
    """The real process at debug level, its Redis and its Postgres behind doors that can be shut."""
    password, database = password_of(redis), urlsplit(dsn)
    host, _, port = redis.address.partition(":")
    async with (
        await Store.open(dsn) as registry,
        TcpProxy((host, int(port))) as redis_door,
        TcpProxy((database.hostname or "", database.port or 0)) as postgres_door,
        Redis.from_url(redis.url) as client,
    ):
        await registry.migrate()
        await registry.apply([Manifest(record=record) for record in RECORDS], actor="test")
        _, key = await registry.create_key("default", ["features", "admin"], actor="test")
        through = f"redis://:{quote(password, safe='')}@127.0.0.1:{redis_door.port}/0"
        with OtlpCollector() as collector:
            ports = folder / "ports.json"
            settings = {
                "RPC__PORT_FILE": ports, "RPC__SERVICE_TOKEN": TOKEN, "RPC__GRACE_S": 5, "PRIVACY__KEY": PRIVACY_KEY,
                "REDIS__URL": through, "FEAST__ENABLED": True, "FEAST__SERVING": True, "FEAST__REDIS__URL": through, "INGESTION__ACK": "applied",
                "REGISTRY__DSN": dsn.replace(f"@{database.hostname}:{database.port}", f"@127.0.0.1:{postgres_door.port}"),
                "SKEW_LOG__SHARE": 1, "SKEW_LOG__FOLDER": folder / "served", "DURABLE__READ_THROUGH_ROWS_PER_S": 1000,
                "TELEMETRY__LOG_LEVEL": "debug", "TELEMETRY__METRICS_PORT": 0, "TELEMETRY__TRACE_EXPORTER": "otlp",
                "TELEMETRY__OTLP_ENDPOINT": collector.address, "TELEMETRY__TRACE_SAMPLE_RATIO": 1,
            }  # fmt: skip
            env = {**os.environ, **{f"PLAIT_FEATURE_RETRIEVAL_{name}": str(value) for name, value in settings.items()}}
            child = Child.start([sys.executable, "-m", "feature_retrieval"], name="feature-retrieval", log=folder / "log", env=env)
            try:
                await until_ready(child, partial(_exists, ports), timeout_s=60)
                addresses = json.loads(ports.read_text())
                async with grpc.aio.insecure_channel(addresses["rpc"]) as channel:
                    yield World(
                        addresses["rpc"], addresses["metrics"], child.log, key, registry, client, redis_door, postgres_door, collector,
                        channel, {"redis password": password, "postgres password": database.password or "", "API key": key, "token": TOKEN,
                                  "privacy key": PRIVACY_KEY, "wrong key": WRONG},
                    )  # fmt: skip
            finally:
                await child.stop(grace_s=20)


async def _exists(file: Path) -> bool:
    return file.exists()


async def eventually(check: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    async with asyncio.timeout(30):
        while not await check():
            await asyncio.sleep(0.02)


# --- what works ---


async def everything_good(w: World) -> None:
    """Call every method so that it succeeds."""
    for view, ids in (("stats", ITEM), ("people", USER), ("pairs", PAIR)):
        await w.good(w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch(view, ids)), metadata=w.mine))
    requests = [
        pb.IngestFeaturesRequest(batch_id=1, batch=batch("stats", ITEM)),
        pb.IngestFeaturesRequest(batch_id=2, batch=batch("stats", USER)),
    ]
    acks = await w.good(w.stub.IngestFeatures(_each(requests), metadata=w.mine))
    w.errors += [f"{ack.status} {ack.result.errors}" for ack in acks]
    assert [bool(ack.status.code) for ack in acks] == [False, True]
    await w.good(
        w.stub.PublishEvents(pb.PublishEventsRequest(events=[event(canaries.EVENT_ID), event("x" + canaries.EVENT_ID)]), metadata=w.mine)
    )
    await eventually(partial(_all_applied, w))
    await w.good(w.stub.GetFeatures(asked(), metadata=w.mine))
    service = (("x-plait-service-token", TOKEN),)
    frames = [_frame(1, asked()), _frame(2, asked(ids={**IDS, "item": USER})), _frame(3, asked(sent=-canaries.VALUE)), _frame(4, asked())]
    frames.append(pb.StreamFeaturesRequest(call={"call_id": 4, "cancel": True}))  # type: ignore[arg-type]
    answers = await w.good(w.stub.StreamFeatures(_each(frames), metadata=service))
    w.errors += [str(answer.status) for answer in answers]
    assert {answer.call_id for answer in answers if answer.status.code} >= {2, 3}
    explained = pb.ExplainFeaturesRequest(feature_set="all", entities=asked().entities, request_features=[budget(1)])
    await w.good(w.stub.ExplainFeatures(explained, metadata=w.mine))
    await w.good(w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="all"), metadata=w.mine))
    await w.good(w.stub.GetViewStatus(pb.GetViewStatusRequest(feature_view="activity"), metadata=w.mine))
    await w.good(w.feast.GetFeastServingInfo(feast_pb.GetFeastServingInfoRequest(), metadata=w.mine))
    await w.good(w.feast.GetOnlineFeatures(_feast("stats:a", "stats:colour"), metadata=w.mine))


async def dead_letters(w: World) -> None:
    """Have events die of every reason that bytes can have, then list and redrive them."""
    bad = [b"\xff" + canaries.ID.encode(), event("", at_us=1).SerializeToString(), event(canaries.EVENT_ID, at_us=1).SerializeToString()]
    bad += [event(canaries.EVENT_ID, ids=USER).SerializeToString(), event(canaries.EVENT_ID, at_us=now_us() + 10**12).SerializeToString()]
    for payload in bad:
        await w.redis.xadd(tenant_key(b"e1", "default"), {b"e": payload, b"t": b"", b"n": canaries.ID.encode()})
    await eventually(partial(_all_applied, w))
    listed = await w.good(w.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=w.mine))
    w.errors += [f"{letter.reason} {letter.message} {letter.origin}" for letter in listed.dead_letters]
    assert len({letter.reason for letter in listed.dead_letters}) >= 4, w.errors
    redriven = await w.good(w.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(), metadata=w.mine))
    assert redriven.redriven == listed.total == len(bad)
    await eventually(partial(_all_applied, w))


async def epochs(w: World) -> None:
    """Fill an epoch of either kind, carry over, flip, purge the old one; export and rebuild."""
    for view in ("stats", "activity"):
        await w.registry.begin_epoch("default", view, actor="test")
    carried = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1)
    await eventually(partial(_succeeds, w, lambda: w.stub.CarryOverEpoch(carried, metadata=w.mine)))
    backfilled = pb.WriteFeaturesRequest(batch=batch("stats", ITEM, epoch=1, backfill=True))
    await w.good(w.stub.WriteFeatures(backfilled, metadata=w.mine))
    events = [event("old" + canaries.EVENT_ID), event("", at_us=1), event("older", at_us=1)]
    replayed = pb.ReplayEventsRequest(feature_view="activity", epoch=1, events=events)
    await eventually(partial(_succeeds, w, lambda: w.stub.ReplayEvents(replayed, metadata=w.mine)))
    await w.good(w.stub.ReplayEvents(pb.ReplayEventsRequest(feature_view="activity", epoch=1), metadata=w.mine))
    await w.registry.abandon_epoch("default", "activity", actor="test")
    purged = pb.PurgeEpochRequest(feature_view="activity", epoch=1)
    await eventually(partial(_succeeds, w, lambda: w.stub.PurgeEpoch(purged, metadata=w.mine)))
    assert await w.good(w.stub.ExportFeatures(pb.ExportFeaturesRequest(feature_view="stats"), metadata=w.mine))
    await w.good(w.stub.RebuildFeatures(pb.RebuildFeaturesRequest(), metadata=w.mine))


async def erased(w: World) -> None:
    """Erase everybody, and try to write them again."""
    for entity_type, ids in IDS.items():
        erase = pb.EraseEntityRequest(entities=rows(entity_type, ids), reason=f"asked by {canaries.ID}")
        answer = await w.good(w.stub.EraseEntity(erase, metadata=w.mine))
        w.errors.append(str(answer))  # nor in a certificate
    answer = await w.good(w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch("stats", ITEM)), metadata=w.mine))
    assert [error.reason for error in answer.errors] == ["ENTITY_ERASED"]
    await w.good(w.stub.PublishEvents(pb.PublishEventsRequest(events=[event("late" + canaries.EVENT_ID)]), metadata=w.mine))
    await eventually(partial(_all_applied, w))


# --- what does not ---


def every_call(w: World, metadata: Any, ids: Mapping[str, types_pb2.EntityIds] = IDS) -> list[Any]:
    """Return a call of every method there is."""
    stub, one = w.stub, asked(ids=ids).entities
    return [
        stub.GetFeatures(asked(ids=ids), metadata=metadata),
        stub.StreamFeatures(_each([_frame(1, asked(ids=ids))]), metadata=metadata),
        stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch("stats", ids["item"])), metadata=metadata),
        stub.IngestFeatures(_each([pb.IngestFeaturesRequest(batch=batch("stats", ids["item"]))]), metadata=metadata),
        stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="all"), metadata=metadata),
        stub.ExplainFeatures(pb.ExplainFeaturesRequest(feature_set="all", entities=one, request_features=[budget(1)]), metadata=metadata),
        stub.PublishEvents(pb.PublishEventsRequest(events=[event("again" + canaries.EVENT_ID, ids=ids["listing"])]), metadata=metadata),
        stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=metadata),
        stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(), metadata=metadata),
        stub.GetViewStatus(pb.GetViewStatusRequest(feature_view="activity"), metadata=metadata),
        stub.ExportFeatures(pb.ExportFeaturesRequest(feature_view="stats"), metadata=metadata),
        stub.CarryOverEpoch(pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1), metadata=metadata),
        stub.PurgeEpoch(pb.PurgeEpochRequest(feature_view="activity", epoch=1), metadata=metadata),
        stub.RebuildFeatures(pb.RebuildFeaturesRequest(), metadata=metadata),
        stub.EraseEntity(pb.EraseEntityRequest(entities=rows("item", ids["item"]), reason=canaries.ID), metadata=metadata),
        stub.ReplayEvents(pb.ReplayEventsRequest(feature_view="activity", epoch=1, events=[event(canaries.EVENT_ID)]), metadata=metadata),
        w.feast.GetOnlineFeatures(_feast("stats:a"), metadata=metadata),
        w.feast.GetFeastServingInfo(feast_pb.GetFeastServingInfoRequest(), metadata=metadata),
    ]  # fmt: skip


async def nobody(w: World) -> None:
    """Call as nobody, with keys and tokens that are wrong, or those of others."""
    for metadata in (
        (),
        (("authorization", f"Bearer {WRONG}"),),
        (("x-api-key", WRONG),),
        (("x-plait-service-token", WRONG),),
        (("authorization", w.key),),
        (("authorization", f"Basic {w.key}"), ("x-plait-service-token", w.key)),
    ):
        assert {await w.refused(call) for call in every_call(w, metadata)} - {"CUT_OFF"} == {"UNAUTHENTICATED"}
    _, narrow = await w.registry.create_key("default", ["rank"], actor="test")
    _, features = await w.registry.create_key("default", ["features"], actor="test")
    for key in (narrow, features):
        metadata = (("x-api-key", key),)
        await eventually(partial(_is_known, w, metadata))
        for call in every_call(w, metadata):
            await either(w, call)


async def garbled(w: World) -> None:
    """Send every method bytes that are no message, and bytes that are cut short."""
    for service in (SERVICE, FEAST_SERVICE):
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            for garbage in (b"\xff" + canaries.ID.encode(), asked().SerializeToString()[:-3], _unknown_field(canaries.ID)):
                metadata = (("x-plait-service-token", TOKEN),) if method.name == "StreamFeatures" else w.mine
                if method.client_streaming:
                    await either(w, w.channel.stream_stream(path)(_each([garbage]), metadata=metadata))
                elif method.server_streaming:
                    await either(w, w.channel.unary_stream(path)(garbage, metadata=metadata))
                else:
                    await either(w, w.channel.unary_unary(path)(garbage, metadata=metadata))


async def wrong_ids(w: World) -> None:
    """Give each method ids that it has to refuse."""
    long, two = "x" * 5000 + canaries.ID, types_pb2.EntityIds(string_ids=[canaries.ID, canaries.ID + "2"], int64_ids=[canaries.NUMBER])
    parted = types_pb2.EntityIds(
        composite_ids=[types_pb2.CompositeKey(parts=[types_pb2.KeyPart(string_part=text) for text in (canaries.ID, canaries.PART)])]
    )
    for ids in (USER, two, parted, types_pb2.EntityIds(string_ids=[canaries.ID, ""]), types_pb2.EntityIds(string_ids=[long])):
        for call in every_call(w, w.mine, {**IDS, "item": ids, "listing": ids, "user": ITEM, "pair": ids}):
            await either(w, call)
        for view in ("stats", "people", "pairs", "others", "activity", "drivers"):
            await either(w, w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch(view, ids)), metadata=w.mine))
        await either(w, w.stub.EraseEntity(pb.EraseEntityRequest(entities=rows("pair", ids), reason=canaries.ID + "\0"), metadata=w.mine))


async def wrong_values(w: World) -> None:
    """Send values, times and columns that have to be refused."""
    for value in (-canaries.VALUE, 1e9, float("nan")):
        await either(w, w.stub.GetFeatures(asked(sent=value), metadata=w.mine))
    for times in ([now_us() + 10**12], [-1], [1, 2, 3]):
        made = batch("stats", ITEM)
        del made.event_times_us[:]
        made.event_times_us.extend(times)
        await either(w, w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=made), metadata=w.mine))
    for field, broken in (("data", b"\0"), ("null_bits", b"\0" * 9), ("offsets", canaries.ID.encode())):
        made = batch("stats", ITEM)
        setattr(made.columns[1], field, broken)
        await either(w, w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=made), metadata=w.mine))
    no_text = batch("stats", ITEM)
    no_text.columns[1].data = b"\xff\xfe" + canaries.TEXT.encode()[2:]
    await either(w, w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=no_text), metadata=w.mine))


async def wrong_places(w: World) -> None:
    """Ask for what is not there, or not the caller's, and go on from where nobody was."""
    fail = asked(ids={**IDS, "item": types_pb2.EntityIds(string_ids=[canaries.ID + "-new"])})
    fail.policy = types_pb2.MISSING_POLICY_FAIL
    await either(w, w.stub.GetFeatures(fail, metadata=w.mine))
    for feature_set in ("secret", "none"):
        await w.refused(w.stub.GetFeatures(asked(feature_set, ids={"item": ITEM}), metadata=w.mine))
    name = "n" * 50_000  # what is said of a name must fit into a trailer
    for call in (
        w.stub.GetFeatures(asked(name), metadata=w.mine),
        w.stub.GetFeatures(pb.GetFeaturesRequest(feature_set="all", inputs=[name, name + "2"]), metadata=w.mine),
        w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set=name), metadata=w.mine),
        w.feast.GetOnlineFeatures(_feast("stats:a", entity=name), metadata=w.mine),
        w.feast.GetOnlineFeatures(feast_pb.GetOnlineFeaturesRequest(feature_service=name), metadata=w.mine),
    ):
        assert await either(w, call) in {"NOT_FOUND", "INVALID_ARGUMENT", "OK"}
    bad = event(canaries.EVENT_ID)
    bad.value = float("inf")
    far = event("e" * 200 + canaries.EVENT_ID, at_us=now_us() + 10**12)
    await w.good(w.stub.PublishEvents(pb.PublishEventsRequest(events=[bad, far, event("", at_us=1)]), metadata=w.mine))
    for token in (canaries.ID, "0-0"):
        await w.refused(w.stub.ListDeadLetters(pb.ListDeadLettersRequest(page_token=token), metadata=w.mine))
        await w.refused(w.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(ids=[token]), metadata=w.mine))
    for cursor in (canaries.ID.encode(), b"\xff" * 40):
        await either(w, w.stub.ExportFeatures(pb.ExportFeaturesRequest(feature_view="stats", cursor=cursor), metadata=w.mine))
        await either(w, w.stub.RebuildFeatures(pb.RebuildFeaturesRequest(cursor=cursor), metadata=w.mine))
        carried = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1, cursor=cursor)
        await either(w, w.stub.CarryOverEpoch(carried, metadata=w.mine))
    await w.registry.begin_epoch("default", "activity", actor="test")
    for cursor in (canaries.ID.encode(), b"1-1", b"1-1 x"):
        replayed = pb.ReplayEventsRequest(feature_view="activity", epoch=2, cursor=cursor)
        await eventually(partial(_is_no_longer_missing, w, replayed))
    for names, column in ((("stats:a",), _values(canaries.NUMBER)), (("stats:a",), _values(1.5)), (("nothing:a",), _values(canaries.ID))):
        request = _feast(*names)
        request.entities["item_id"].CopyFrom(column)
        await w.refused(w.feast.GetOnlineFeatures(request, metadata=w.mine))


async def unreadable(w: World) -> None:
    """Read rows, ours and Feast's, whose bytes are none, and keys of another type."""
    [key] = EntityKeys(FEAST).keys([canaries.ID])
    await w.redis.hset(key, mapping={time_field_of("drivers"): canaries.ID.encode(), field_of("drivers", "a"): b"\xff"})
    rides = asked("rides", ids={"driver": ITEM})
    del rides.request_features[:]
    await either(w, w.stub.GetFeatures(rides, metadata=w.mine))
    await either(w, w.feast.GetOnlineFeatures(_feast("drivers:a", entity="driver_id"), metadata=w.mine))
    explained = pb.ExplainFeaturesRequest(feature_set="all", entities=asked().entities, request_features=[budget(1)])
    stored = [view.key for view in (await w.good(w.stub.ExplainFeatures(explained, metadata=w.mine))).views]
    assert len(stored) == 4
    for value in (b"\x01" + canaries.ID.encode(), b"\xff" * 200):
        for key in stored:
            await w.redis.set(key, value)
        for call in every_call(w, w.mine):
            await either(w, call)
    for key in stored:
        await w.redis.delete(key)
        await w.redis.rpush(key, canaries.ID)
    for call in every_call(w, w.mine):
        await either(w, call)
    await w.redis.delete(*stored)


async def left(w: World) -> None:
    """Leave amid streams, and have no time."""
    going = w.stub.IngestFeatures(metadata=w.mine)
    for number in range(20):
        await going.write(pb.IngestFeaturesRequest(batch_id=number, batch=batch("stats", ITEM)))
    await going.read()
    going.cancel()
    streaming = w.stub.StreamFeatures(metadata=(("x-plait-service-token", TOKEN),))
    for number in range(20):
        await streaming.write(_frame(number + 1, asked()))
    await streaming.read()
    streaming.cancel()
    for call in every_call(w, w.mine):
        call.cancel()
    await either(w, w.stub.GetFeatures(asked(), metadata=w.mine, timeout=0.001))
    await either(w, w.feast.GetOnlineFeatures(_feast("stats:a"), metadata=w.mine, timeout=0.001))


async def away(w: World, door: TcpProxy) -> None:
    """Call everything while a server is away."""
    target = door.target
    await door.cut()
    seen = [await either(w, call) for call in every_call(w, w.mine)]
    assert "UNAVAILABLE" in seen
    door.target = target
    await eventually(partial(_is_well, w))


def _unknown_field(text: str) -> bytes:
    """A message of one field that nobody knows."""
    return b"\xfa\x01" + bytes([len(text)]) + text.encode()


async def either(w: World, call: Any) -> str:
    """Look through what a call says that may fail or not; a fault of ours (INTERNAL) it must not be."""
    try:
        for answer in await asyncio.wait_for(_all_of(w, call), 30):
            w.errors.append(str(getattr(answer, "status", "")))
    except grpc.aio.AioRpcError as error:
        w.errors += [str(error.details()), str(error.debug_error_string()), str(error.trailing_metadata())]
        code = _code(error)
        if code in {"INTERNAL", "UNKNOWN"}:
            pytest.fail(f"{error.details()}: {w.log.read_text()[-6000:]}")
        return code
    return "OK"


def _code(error: grpc.aio.AioRpcError) -> str:
    """Name the status; grpc.aio's client, refused before it has sent anything, hides it behind words of its own (see rpc/core_server.py)."""
    return "CUT_OFF" if "Internal error from Core" in str(error.details()) else error.code().name


async def _all_of(w: World, call: Any) -> Sequence[Any]:
    answer = await w.good(call)
    return answer if isinstance(answer, list) else [answer]


async def _succeeds(w: World, call: Callable[[], Any]) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await w.good(call())
        return True
    return False


async def _is_no_longer_missing(w: World, request: Any) -> bool:
    return await either(w, w.stub.ReplayEvents(request, metadata=w.mine)) != "NOT_FOUND"


async def _is_known(w: World, metadata: Any) -> bool:
    described = w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="all"), metadata=metadata)
    return await either(w, described) != "UNAUTHENTICATED"


async def _is_well(w: World) -> bool:
    written = w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch("people", USER)), metadata=w.mine)
    return (
        await either(w, written) == "OK" and await either(w, w.stub.RebuildFeatures(pb.RebuildFeaturesRequest(), metadata=w.mine)) == "OK"
    )


async def _all_applied(w: World) -> bool:
    return not (await w.stub.GetViewStatus(pb.GetViewStatusRequest(feature_view="activity"), metadata=w.mine)).lag_events


def _frame(call_id: int, request: pb.GetFeaturesRequest) -> pb.StreamFeaturesRequest:
    return pb.StreamFeaturesRequest(call={"call_id": call_id, "tenant": "default", "request_id": "r1"}, request=request)  # type: ignore[arg-type]


async def _each(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def _values(*ids: float | str) -> Any:
    made = feast_pb.GetOnlineFeaturesRequest().entities["x"]
    for one in ids:
        made.val.add(**{"string_val" if isinstance(one, str) else "int64_val" if isinstance(one, int) else "double_val": one})
    return made


def _feast(*names: str, entity: str = "item_id") -> Any:
    request = feast_pb.GetOnlineFeaturesRequest(features={"val": names})  # type: ignore[arg-type]
    request.entities[entity].CopyFrom(_values(canaries.ID))
    return request


async def test_nothing_that_is_called_leaks(redis_url: str, redis_server: EmbeddedRedis, postgres_dsn: str, tmp_path: Path) -> None:
    async with world(redis_server, postgres_dsn, tmp_path) as w:
        await everything_good(w)
        await dead_letters(w)
        await epochs(w)
        await erased(w)
        answered = (await w.told())["metrics"]
        methods = [f"/{service.full_name}/{method.name}" for service in (SERVICE, FEAST_SERVICE) for method in service.methods]
        assert [m for m in methods if f'plait_rpc_server_handled_total{{code="OK",method="{m}"}}' not in answered] == []
        await nobody(w)
        await garbled(w)
        await wrong_ids(w)
        await wrong_values(w)
        await wrong_places(w)
        await unreadable(w)
        await left(w)
        await away(w, w.redis_door)
        await away(w, w.postgres_door)
        unary = {m for m in methods if m.rpartition("/")[2] not in {"IngestFeatures", "StreamFeatures"}}
        names = {m.removeprefix("/") for m in unary} | {"apply events"}
        await asyncio.to_thread(w.collector.wait, lambda spans: names <= {span.name.removeprefix("/") for _, span in spans})
        told = await w.told()
    told["logs"] = w.log.read_text()  # its last words, too
    assert "drained" in told["logs"]
    assert '"level": "debug"' in told["logs"]
    for where, text in told.items():
        leaks = {f"{name} as {form!r}": _around(text, form) for form, name in canaries.forms(w.secrets).items() if form in text}
        assert not leaks, (where, leaks)
    assert "by a fault of ours" not in told["logs"]


def _around(text: str, form: str) -> str:
    at = text.index(form)
    return text[max(0, at - 300) : at + 100]
