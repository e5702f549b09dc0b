"""What happened, as batches: everything once, in time order, with the rows the offline features have."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from tests.fakes.event_service import SHOP, consuming, event_service
from tests.fakes.event_world import NOW_S

from marketplace import manifests, producer
from marketplace.data import Dataset
from marketplace.features import GLOBAL_MEAN, HALF_LIFE_S, Features, view_features
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument, PlaitError, Violation
from plait.registry.manifests import load
from plait.registry.resources import snapshot_of


def test_every_row_is_produced_once(data: Dataset, features: Features) -> None:
    batches = list(producer.batches(data, features))
    assert sum(len(b.ids.string_ids) for b in batches) == producer.row_count(data)
    assert [b.feature_view for b in batches] == ["user-profile", "item-content", *["user-behaviour", "item-stats"] * 3]
    assert max(len(b.ids.string_ids) for b in batches) <= producer.BATCH_EVENTS
    assert list(batches[0].ids.string_ids) == list(data.user_ids)
    assert list(batches[1].ids.string_ids) == list(data.item_ids)


def test_a_batch_is_one_matrix_of_its_view(data: Dataset, features: Features) -> None:
    names = view_features(data)
    for batch in producer.batches(data, features):
        [column] = batch.columns
        assert tuple(column.features) == names[batch.feature_view]
        assert column.dtype == types_pb2.DATA_TYPE_FLOAT32
        assert len(column.data) == 4 * len(column.features) * len(batch.ids.string_ids)


@pytest.mark.parametrize(
    ("view", "running", "entities"), [("user-behaviour", "user_behaviour", "event_user"), ("item-stats", "item_stats", "event_item")]
)
def test_events_are_in_order_and_those_of_one_second_too(data: Dataset, features: Features, view: str, running: str, entities: str) -> None:
    batches = [b for b in producer.batches(data, features) if b.feature_view == view]
    times = [t for b in batches for t in b.event_times_us]
    sequences = [s for b in batches for s in b.sequences]
    assert times == (data.event_time_s * 1_000_000).tolist()
    order = list(zip(times, sequences, strict=True))
    assert order == sorted(set(order))  # strictly: no two events of an entity are taken for one
    ids = data.user_ids if view == "user-behaviour" else data.item_ids
    assert [i for b in batches for i in b.ids.string_ids] == [ids[at] for at in getattr(data, entities).tolist()]
    values = np.concatenate([np.frombuffer(b.columns[0].data, "<f4").reshape(len(b.ids.string_ids), -1) for b in batches])
    np.testing.assert_array_equal(values, getattr(features, running).rows[1:])  # the state after each event


def test_nothing_is_written_before_it_was_true(data: Dataset, features: Features) -> None:
    first = int(data.event_time_s[0]) * 1_000_000
    for batch in producer.batches(data, features):
        assert batch.event_times_us[0] >= first
        assert len(batch.event_times_us) in (1, len(batch.ids.string_ids))


def test_a_refused_batch_or_row_stops_the_replay() -> None:
    error = InvalidArgument("does not fit", violations=[Violation("columns[0]", "unknown")])
    ack = pb.IngestFeaturesResponse(batch_id=3)
    ack.status.code, ack.status.message = error.code.value[0], error.message
    ack.status.status_details = error.to_status().SerializeToString()
    with pytest.raises(InvalidArgument) as caught:
        producer._refuse(ack)
    assert caught.value.violations == error.violations
    ack = pb.IngestFeaturesResponse(batch_id=4)
    ack.result.errors.add(row=7, reason="EVENT_TIME_IN_FUTURE", message="too far ahead")
    with pytest.raises(PlaitError, match="batch 4: 1 rows were refused, the first for EVENT_TIME_IN_FUTURE: too far ahead"):
        producer._refuse(ack)
    producer._refuse(pb.IngestFeaturesResponse(batch_id=5, result={"applied": 1}))


async def test_what_the_service_counts_from_the_events_is_what_the_features_say(data: Dataset, features: Features, redis_url: str) -> None:
    records = [manifest.record for manifest in load([manifests.FOLDER / "activity.yaml"])]
    async with event_service(redis_url, snapshot=snapshot_of(1, records, [])) as service:
        async with grpc.aio.insecure_channel(service.address) as channel, consuming(service.consumer()):
            for _ in range(2):  # publishing twice changes nothing
                told: list[int] = []
                assert await producer.publish(channel, "shop-key", data, NOW_S, told.append) == sum(told) == len(data.rating)
            while (await service.source("front").backlog_of("shop")).events:
                await asyncio.sleep(0.01)
        request = pb.GetFeaturesRequest(feature_set=manifests.ACTIVITY)
        request.entities.add(entity_type="item").ids.string_ids.extend(data.item_ids)
        answer = await service.stub.GetFeatures(request, metadata=SHOP, timeout=20)
    online = np.frombuffer(answer.tensors[0].data, np.float32).reshape(tuple(answer.tensors[0].shape))
    counts = np.bincount(data.event_item, minlength=len(data.item_ids))
    np.testing.assert_array_equal(online[:, 0], counts)
    totals = np.bincount(data.event_item, data.rating, len(data.item_ids))
    np.testing.assert_allclose(online[:, 1], np.where(counts > 0, totals / np.maximum(counts, 1), GLOBAL_MEAN), rtol=1e-6)
    age_s = (data.event_time_s[-1] - data.event_time_s).astype(float)
    recent = np.bincount(data.event_item, np.exp2(-age_s / HALF_LIFE_S), len(data.item_ids))
    np.testing.assert_allclose(online[:, 2], recent, rtol=5e-3, atol=1e-2)


async def test_events_that_are_refused_stop_the_publishing(data: Dataset, redis_url: str) -> None:
    async with event_service(redis_url) as service, grpc.aio.insecure_channel(service.address) as channel:
        with pytest.raises(PlaitError, match="EVENT_TIME_IN_FUTURE"):
            await producer.publish(channel, "shop-key", data, NOW_S + 86_400)
