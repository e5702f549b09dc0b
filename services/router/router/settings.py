"""Settings of the router: PLAIT_ROUTER_…; `python -m router --settings` lists them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from plait.redis.settings import RedisSettings
from plait.settings import ChannelSettings, Group, ServiceSettings
from router.discovery import static


class AdmissionSettings(Group):
    """How much work the router takes on at once."""

    adaptive: bool = Field(True, description="find the limit by how long workers take; off: it is `limit`, always")
    limit: int = Field(1024, ge=1, le=100_000, description="most requests worked on at once, in requests of mean cost")
    min_limit: int = Field(2, ge=1, le=100_000, description="least the limit falls to while it adapts, in requests of mean cost")
    start: int = Field(64, ge=1, le=100_000, description="the limit at first while it adapts, in requests of mean cost")
    queue: int = Field(1024, ge=0, le=100_000, description="requests that may wait for their turn; more are answered RESOURCE_EXHAUSTED")
    max_wait_s: float = Field(0.2, gt=0, le=60, description="longest wait for a turn, seconds; much less while more comes in than goes out")
    min_budget_s: float = Field(0.001, ge=0, le=60, description="requests with less left of their deadline are refused at once, seconds")
    retry_after_s: float = Field(0.1, gt=0, le=60, description="least time after which a refused caller is asked to come back, seconds")
    max_cells: int = Field(4_000_000, ge=1, description="most values (rows by columns) of one request's features; more is refused")


class CacheSettings(Group):
    """Answers that are kept, on routes that say so."""

    bytes: int = Field(64 << 20, ge=1 << 16, le=1 << 36, description="memory for answers, bytes; one of more than a 64th of it is not kept")
    scores_bytes: int = Field(64 << 20, ge=1 << 16, le=1 << 36, description="memory for scores of single candidates, bytes")
    redis_budget_s: float = Field(0.005, gt=0, le=1, description="longest wait for what another router kept in the shared Redis, seconds")


class RepeatsSettings(Group):
    """Answers that are kept for calls which are made again, on routes with a repeat_window_s."""

    bytes: int = Field(32 << 20, ge=1 << 16, le=1 << 36, description="memory for answers, bytes; one of more than a 64th of it is not kept")


class SharedSettings(RedisSettings):
    """The Redis that routers tell each other things by. None of them needs it to answer."""

    url: SecretStr = Field(
        SecretStr(""), description="redis:// or rediss:// (TLS) URL that all routers share; empty = each router stands for itself"
    )

    @field_validator("url")
    @classmethod
    def _redis_url(cls, url: SecretStr) -> SecretStr:
        return super()._redis_url(url) if url.get_secret_value() else url


class JournalSettings(Group):
    """What is written down for experiments: exposures and outcomes, in the shared Redis."""

    key: SecretStr = Field(
        SecretStr(""),
        description="secret that the units of exposures are hashed with, the same on every router; empty = one that is forgotten at the end",
    )
    queue: int = Field(10_000, ge=1, le=10_000_000, description="exposures that may wait to be written; more are dropped and counted")
    max_entries: int = Field(
        1_000_000, ge=1000, le=1_000_000_000, description="exposures, and as many outcomes, kept per tenant; the oldest go first"
    )
    known_s: float = Field(
        86_400.0, ge=60, le=31 * 86_400, description="how long an outcome is known, so that a repeat does not count, seconds"
    )


class KubernetesSettings(Group):
    """A Kubernetes Service whose pods are followed; needs the extra `plait-router[kubernetes]`."""

    namespace: str = Field("default", min_length=1, description="namespace of the service")
    service: str = Field("", description="name of the service; empty = addresses are used instead")
    port: str = Field("grpc", min_length=1, description="name of the service's port")


class QuotaSettings(Group):
    """How routers share the quotas of tenants, where there is a Redis."""

    lease_s: float = Field(
        1.0, ge=0.1, le=60, description="for how long a router has its part of a quota, seconds; renewed five times in it"
    )


class EndpointsSettings(Group):
    """Where a service behind the router listens."""

    addresses: str = Field("", description="host:port of each replica, separated by commas")
    connections: int = Field(4, ge=1, le=64, description="most connections to each replica: another one for every 64 calls under way")
    slow_start_s: float = Field(
        10.0, ge=0, le=600, description="how long a replica that is new, or was avoided, gets less than its share, seconds"
    )
    zone: str = Field("", description="zone of this process; replicas of the same zone are preferred while they have room; empty = no zone")
    ejection_s: float = Field(0.5, gt=0, le=60, description="how long a replica that failed is avoided, seconds; doubles while it fails")
    max_ejection_s: float = Field(30.0, gt=0, le=600, description="longest time a replica is avoided, seconds")
    channel: ChannelSettings = Field(
        default_factory=ChannelSettings, description="how the replicas are called; an empty service_token means rpc.service_token"
    )

    @field_validator("addresses", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """A file may hold a list."""
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("addresses")
    @classmethod
    def _usable(cls, value: str) -> str:
        static.parse(value)
        return value

    @property
    def addresses_listed(self) -> tuple[str, ...]:
        """The addresses, apart."""
        return static.parse(self.addresses)


class FeaturesSettings(EndpointsSettings):
    """Feature-retrieval."""

    addresses: str = Field("127.0.0.1:50052", description="host:port of each feature-retrieval replica, separated by commas")
    budget_share: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of what is left of a request's budget that reading features may take; the rest is kept for the model",
    )


class WorkersSettings(EndpointsSettings):
    """Model-workers."""

    addresses: str = Field("127.0.0.1:50053", description="host:port of each model-worker, separated by commas")
    kubernetes: KubernetesSettings = Field(default_factory=KubernetesSettings, description="the service to follow instead of addresses")

    @model_validator(mode="after")
    def _one_way(self) -> WorkersSettings:
        if self.kubernetes.service and "addresses" in self.model_fields_set:
            raise ValueError("addresses would be ignored, as kubernetes.service says whom to follow: leave one of them out")
        return self


class RouterSettings(ServiceSettings):
    """All settings of the service."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_ROUTER_")

    admission: AdmissionSettings = Field(default_factory=AdmissionSettings, description="how much work is taken on at once")
    features: FeaturesSettings = Field(default_factory=FeaturesSettings, description="feature-retrieval, behind the router")
    workers: WorkersSettings = Field(default_factory=WorkersSettings, description="model-workers, behind the router")
    redis: SharedSettings = Field(default_factory=SharedSettings, description="what routers share")
    cache: CacheSettings = Field(default_factory=CacheSettings, description="answers that are kept")
    repeats: RepeatsSettings = Field(default_factory=RepeatsSettings, description="answers that are kept for calls made again")
    quotas: QuotaSettings = Field(default_factory=QuotaSettings, description="how routers share the quotas of tenants")
    journal: JournalSettings = Field(default_factory=JournalSettings, description="what is written down for experiments")
