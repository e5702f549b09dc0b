"""What the service can be told, by name; and that it refuses what it cannot use."""

from __future__ import annotations

import os

import pytest

from feature_retrieval.settings import FeatureRetrievalSettings
from plait.settings import SettingsError, fields, load

PREFIX = "PLAIT_FEATURE_RETRIEVAL_"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, **environ: str) -> FeatureRetrievalSettings:
    for name, value in environ.items():
        monkeypatch.setenv(f"{PREFIX}{name}", value)
    return load(FeatureRetrievalSettings)


def test_defaults_are_usable_and_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch)
    assert settings.redis.url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert settings.redis.connections > 0
    assert settings.near_cache.max_bytes > 0
    assert settings.rpc.require_auth


def test_every_own_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch,
        REDIS__URL="rediss://:secret@redis:6380/1",
        REDIS__CONNECTIONS="3",
        REDIS__CONNECT_TIMEOUT_S="0.5",
        REDIS__WRITE_TIMEOUT_S="2",
        NEAR_CACHE__MAX_BYTES="0",
        NEAR_CACHE__MAX_AGE_S="7.5",
        FEAST__ENABLED="true",
        FEAST__REDIS__URL="redis://:secret@feast:6379/0",
    )
    assert (settings.feast.enabled, settings.feast.serving) == (True, False)
    assert settings.feast.redis.url.get_secret_value() == "redis://:secret@feast:6379/0"
    assert settings.redis.url.get_secret_value() == "rediss://:secret@redis:6380/1"
    assert (settings.redis.connections, settings.redis.connect_timeout_s, settings.redis.write_timeout_s) == (3, 0.5, 2.0)
    assert (settings.near_cache.max_bytes, settings.near_cache.max_age_s) == (0, 7.5)
    assert "secret" not in repr(settings)


def test_every_setting_has_a_meaning() -> None:
    named = dict(fields(FeatureRetrievalSettings))
    own = {name.removeprefix(PREFIX) for name in named}
    own = {name for name in own if name.startswith(("REDIS__", "NEAR_CACHE__", "DURABLE__"))}
    assert own == {
        *("REDIS__URL", "REDIS__CONNECTIONS", "REDIS__CONNECT_TIMEOUT_S", "REDIS__WRITE_TIMEOUT_S"),
        *("REDIS__MODE", "REDIS__NODES", "REDIS__SENTINEL_SERVICE", "REDIS__SENTINEL_PASSWORD", "REDIS__TTL_JITTER"),
        *("REDIS__TLS_CA", "REDIS__TLS_CERT", "REDIS__TLS_KEY"),
        *("NEAR_CACHE__MAX_BYTES", "NEAR_CACHE__MAX_AGE_S"),
        *("DURABLE__QUEUE_ROWS", "DURABLE__BATCH_ROWS", "DURABLE__CONNECTIONS", "DURABLE__READ_THROUGH_ROWS_PER_S"),
    }
    feasts = {name.removeprefix(f"{PREFIX}FEAST__") for name in named if name.startswith(f"{PREFIX}FEAST__")}
    assert feasts == {"ENABLED", "SERVING", *(name for name in own if name.startswith("REDIS__") and name != "REDIS__TTL_JITTER")}
    assert all(not meaning.startswith("None") for meaning in named.values())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("REDIS__CONNECTIONS", "0", "greater than or equal to 1"),
        ("REDIS__CONNECTIONS", "1025", "less than or equal to 1024"),
        ("REDIS__CONNECTIONS", "many", "integer"),
        ("REDIS__CONNECT_TIMEOUT_S", "0", "greater than 0"),
        ("REDIS__CONNECT_TIMEOUT_S", "61", "less than or equal to 60"),
        ("REDIS__WRITE_TIMEOUT_S", "-1", "greater than 0"),
        ("NEAR_CACHE__MAX_BYTES", "-1", "greater than or equal to 0"),
        ("NEAR_CACHE__MAX_BYTES", "64MiB", "integer"),
        ("NEAR_CACHE__MAX_AGE_S", "0", "greater than 0"),
    ],
)
def test_bad_values_are_refused_with_name_value_and_expectation(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, **{name: value})
    assert f"{PREFIX}{name}='{value}'" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:6379", "http://redis:6379", "redis://", "redis://a:port", "redis://:p4ss/@a"])
def test_a_url_that_is_not_redis_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, REDIS__URL=url)
    assert f"{PREFIX}REDIS__URL=<hidden>" in str(caught.value)
    assert "expected redis://host:port/database" in str(caught.value)
    assert "p4ss" not in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=f"{PREFIX}REDIS__ULR.*did you mean {PREFIX}REDIS__URL"):
        read(monkeypatch, REDIS__ULR="redis://a")


def test_every_deployment_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    redis = read(
        monkeypatch,
        REDIS__URL="rediss://:secret@x/0",
        REDIS__MODE="sentinel",
        REDIS__NODES="s1:26379, [::1]:26380",
        REDIS__SENTINEL_SERVICE="shop",
        REDIS__SENTINEL_PASSWORD="secret",
        REDIS__TLS_CA="/ca.pem",
        INGESTION__ACK="replicated",
        INGESTION__REPLICAS="2",
    )
    assert redis.redis.node_list == ("s1:26379", "[::1]:26380")
    assert (redis.ingestion.ack, redis.ingestion.replicas) == ("replicated", 2)
    assert "secret" not in repr(redis)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"REDIS__MODE": "sentinel", "REDIS__NODES": "s:1"}, "needs nodes"),
        ({"REDIS__MODE": "sentinel", "REDIS__SENTINEL_SERVICE": "shop"}, "needs nodes"),
        ({"REDIS__MODE": "cluster", "REDIS__URL": "redis://x/3"}, "database 0 only"),
        ({"REDIS__NODES": "one"}, "host:port"),
        ({"REDIS__NODES": "a:1,:secret@b:2"}, "host:port"),
        ({"REDIS__NODES": "a:99999"}, "host:port"),
        ({"REDIS__TLS_CERT": "/c.pem", "REDIS__URL": "rediss://x"}, "tls_cert and tls_key"),
        ({"REDIS__TLS_CA": "/c.pem"}, "would be ignored"),
        ({"REDIS__MODE": "replica"}, "single"),
        ({"INGESTION__ACK": "perhaps"}, "applied"),
    ],
)
def test_what_does_not_fit_together_is_refused(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read(monkeypatch, **environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"EVENTS__SOURCE": "kafka"}, "needs kafka_servers and kafka_topics"),
        ({"EVENTS__SOURCE": "kafka", "EVENTS__KAFKA_SERVERS": "k:9092", "EVENTS__KAFKA_TOPICS": "shop"}, "expected tenant=topic"),
        ({"EVENTS__KAFKA_TOPICS": "shop=a,=b"}, "expected tenant=topic"),
        ({"EVENTS__SOURCE": "pulsar"}, "redis"),
    ],
)
def test_a_source_of_events_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(monkeypatch, **environ)


def test_events_come_from_redis_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch).events.source == "redis"
    kafka = read(monkeypatch, EVENTS__SOURCE="kafka", EVENTS__KAFKA_SERVERS="k:9092", EVENTS__KAFKA_TOPICS="shop=a,mall=b").events
    assert (kafka.kafka_group, kafka.kafka_topics) == ("plait", "shop=a,mall=b")
