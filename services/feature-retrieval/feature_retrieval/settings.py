"""Settings of feature-retrieval: PLAIT_FEATURE_RETRIEVAL_…; `python -m feature_retrieval --settings` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from plait.redis.settings import RedisSettings
from plait.settings import Group, ServiceSettings


class RowStoreSettings(RedisSettings):
    """The row store."""

    ttl_jitter: float = Field(
        0.1, ge=0, le=1, description="largest share by which a row is kept longer than its view says, so that rows do not expire together"
    )


class IngestionSettings(Group):
    """How writes are taken."""

    ack: Literal["auto", "applied", "synced", "replicated"] = Field(
        "auto",
        description="when a write is acknowledged: applied in memory, synced in the append-only file, replicated; auto = synced where Redis can",
    )
    replicas: int = Field(1, ge=1, le=16, description="replicas that must have a write before it is acknowledged as replicated")
    max_future_s: float = Field(300.0, ge=0, description="how far an event time may be ahead of this service's clock, seconds")
    max_batches: int = Field(
        64, ge=1, le=4096, description="batches of one stream in flight; where acks wait for a disk, one may take a second"
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="bytes of one stream's batches in flight")


class NearCacheSettings(Group):
    """Rows of hot entities kept in this process."""

    max_bytes: int = Field(64 * 1024 * 1024, ge=0, description="memory for rows and their index, bytes; 0 turns the near cache off")
    max_age_s: float = Field(
        300.0, gt=0, description="backstop: longest time a row is kept although nothing was heard of a change, seconds"
    )


class PrivacySettings(Group):
    """Erasing people and things."""

    key: SecretStr = Field(
        SecretStr(""),
        description="32 or more random characters, kept for as long as certificates are to be verified: signs them, and hides ids in logs",
    )
    poll_s: float = Field(30.0, gt=0, description="how often erasures that a process left half done are completed, seconds")

    @field_validator("key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if 0 < len(key.get_secret_value().encode()) < 32:
            raise ValueError("expected 32 or more bytes: openssl rand -hex 32")
        return key


class EventSettings(Group):
    """Where the events come from that aggregated views count."""

    source: Literal["none", "redis", "kafka"] = Field(
        "redis",
        description="redis: the streams that PublishEvents appends to; kafka: these, and topics of Kafka; none: no events are taken",
    )
    consumer: str = Field("", description="name of this replica in the consumer group, unique among them; empty = host and process")
    batch: int = Field(2000, ge=1, le=10_000, description="most events of a tenant applied together")
    max_backlog: int = Field(
        1_000_000, ge=1, description="events of a tenant that may wait; with more, PublishEvents answers EVENT_BACKLOG"
    )
    claim_after_s: float = Field(30.0, gt=0, le=3600, description="after how long events that a dead replica took are taken over, seconds")
    keep_s: float = Field(3600.0, ge=0, description="how long applied events stay in the stream, seconds")
    kafka_servers: str = Field("", description="host:port of Kafka brokers, separated by commas")
    kafka_topics: str = Field("", description="tenant=topic pairs, separated by commas")
    kafka_group: str = Field("plait", description="consumer group in Kafka")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field("PLAINTEXT", description="how to connect")
    kafka_sasl_mechanism: str = Field("PLAIN", description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512, with SASL_…")
    kafka_user: str = Field("", description="user name, with SASL_…")
    kafka_password: SecretStr = Field(SecretStr(""), description="password, with SASL_…")
    kafka_ca: Path | None = Field(None, description="PEM file of the authority that signed the brokers' certificates; empty = the system's")

    @field_validator("kafka_topics")
    @classmethod
    def _pairs(cls, topics: str) -> str:
        if any(not all(pair.partition("=")[::2]) for pair in topics.split(",") if pair):
            raise ValueError("expected tenant=topic,tenant=topic")
        return topics

    @model_validator(mode="after")
    def _whole(self) -> EventSettings:
        if self.source == "kafka" and not (self.kafka_servers and self.kafka_topics):
            raise ValueError("source kafka needs kafka_servers and kafka_topics")
        return self


class DurableSettings(Group):
    """The copy of rows in the registry's Postgres, for views that ask for one (spec.durable)."""

    queue_rows: int = Field(
        100_000,
        ge=1,
        description="rows that may wait to be copied behind their writes; more writes wait for Postgres to get on, else are refused",
    )
    batch_rows: int = Field(1000, ge=1, le=10_000, description="rows copied by one statement")
    connections: int = Field(4, ge=1, le=64, description="connections to Postgres at most")
    read_through_rows_per_s: float = Field(
        0.0,
        ge=0,
        description="rows a second that are looked for in Postgres where Redis has none or is away; others are UNAVAILABLE; 0 = off",
    )


class FeastSettings(Group):
    """An existing Feast online store, for the views that say `feast`."""

    enabled: bool = Field(False, description="read such views' rows from Feast's Redis; off: they are answered as unavailable")
    redis: RedisSettings = Field(default_factory=RedisSettings, description="Feast's Redis")
    serving: bool = Field(False, description="also answer feast.serving.ServingService, for Feast's own clients")


class SkewLogSettings(Group):
    """The rows that were served, for a sample of entities."""

    folder: Path = Field(Path("skew-log"), description="where files of served rows are written; they hold ids and feature values")
    share: float = Field(0.0, ge=0, le=1, description="share of all entity ids whose rows are logged, in every answer; 0 = none")
    max_file_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="a file is finished at this size, bytes")
    max_file_s: float = Field(3600.0, gt=0, description="a file is finished after this time, seconds")
    queue_rows: int = Field(10_000, ge=1, description="rows that may wait to be written; more are dropped and counted")


class FeatureRetrievalSettings(ServiceSettings):
    """All settings of the service."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_FEATURE_RETRIEVAL_")

    redis: RowStoreSettings = Field(default_factory=RowStoreSettings, description="the row store")
    near_cache: NearCacheSettings = Field(default_factory=NearCacheSettings, description="rows of hot entities in this process")
    ingestion: IngestionSettings = Field(default_factory=IngestionSettings, description="how writes are taken")
    privacy: PrivacySettings = Field(default_factory=PrivacySettings, description="erasing people and things")
    events: EventSettings = Field(default_factory=EventSettings, description="events that aggregated views count")
    durable: DurableSettings = Field(default_factory=DurableSettings, description="the copy of rows in Postgres")
    feast: FeastSettings = Field(default_factory=FeastSettings, description="an existing Feast online store")
    skew_log: SkewLogSettings = Field(default_factory=SkewLogSettings, description="the rows that were served, for a sample of entities")
