"""From settings to a store."""

from __future__ import annotations

from feature_retrieval.settings import IngestionSettings, RowStoreSettings
from feature_retrieval.store.redis import RedisStore
from plait.redis.opening import topology_of
from plait.telemetry.metrics import Metrics


def open_store(redis: RowStoreSettings, ingestion: IngestionSettings, metrics: Metrics) -> RedisStore:
    """Return the store the settings describe; nothing is connected yet."""
    seconds = metrics.histogram("plait_features_store_seconds", "time an operation on Redis took, seconds", ["operation"])
    return RedisStore(
        topology_of(redis),
        write_timeout_s=redis.write_timeout_s,
        ttl_jitter=redis.ttl_jitter,
        ack=ingestion.ack,
        replicas=ingestion.replicas,
        observe=lambda operation, took_s: seconds.labels(operation).observe(took_s),
    )
