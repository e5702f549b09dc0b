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


class FeatureRetrievalSettings(ServiceSettings):
    """All settings of the service."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_FEATURE_RETRIEVAL_")

    redis: RedisSettings = Field(default_factory=RedisSettings, description="the row store")
    near_cache: NearCacheSettings = Field(default_factory=NearCacheSettings, description="rows of hot entities in this process")
