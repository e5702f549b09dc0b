"""Settings of feature-retrieval: PLAIT_FEATURE_RETRIEVAL_…; `python -m feature_retrieval --settings` lists them."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from plait.settings import Group, ServiceSettings


class RedisSettings(Group):
    """The row store."""

    url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis:// or rediss:// (TLS) URL of one server; Sentinel and Cluster are not supported yet",
    )
    connections: int = Field(32, ge=1, le=1024, description="connections at most, each used by one read or write at a time")
    connect_timeout_s: float = Field(1.0, gt=0, le=60, description="longest wait for a connection, seconds")
    write_timeout_s: float = Field(5.0, gt=0, le=60, description="longest wait for a write's answer, seconds")

    @field_validator("url")
    @classmethod
    def _redis_url(cls, url: SecretStr) -> SecretStr:
        try:
            parts = urlsplit(url.get_secret_value())
            usable = parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # its message would show a part of the URL, which may be the password
            usable = False
        if not usable:
            raise ValueError("expected redis://host:port/database or rediss://…, special characters of the password percent-encoded")
        return url


class NearCacheSettings(Group):
    """Rows of hot entities kept in this process."""

    max_bytes: int = Field(64 * 1024 * 1024, ge=0, description="memory for rows and their index, bytes; 0 turns the near cache off")
    max_age_s: float = Field(
        300.0, gt=0, description="backstop: longest time a row is kept although nothing was heard of a change, seconds"
    )


class IngestionSettings(Group):
    """Taking rows."""

    max_future_s: float = Field(300.0, ge=0, description="how far an event time may be ahead of this service's clock, seconds")
    max_batches: int = Field(
        64, ge=1, le=4096, description="batches of one stream in flight; where acks wait for a disk, one may take a second"
    )
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="bytes of one stream's batches in flight")


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


class FeatureRetrievalSettings(ServiceSettings):
    """All settings of the service."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_FEATURE_RETRIEVAL_")

    redis: RedisSettings = Field(default_factory=RedisSettings, description="the row store")
    near_cache: NearCacheSettings = Field(default_factory=NearCacheSettings, description="rows of hot entities in this process")
    ingestion: IngestionSettings = Field(default_factory=IngestionSettings, description="taking rows")
    privacy: PrivacySettings = Field(default_factory=PrivacySettings, description="erasing people and things")
