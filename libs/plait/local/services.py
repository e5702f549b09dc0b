"""The three services as a local mesh runs them: which module each one is, and the settings that tie them to each other."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

FEATURE_RETRIEVAL: Final = "feature-retrieval"
MODEL_WORKER: Final = "model-worker"
ROUTER: Final = "router"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How one service is started: `python -m module`, with settings whose names start with `prefix`."""

    name: str
    module: str

    @property
    def prefix(self) -> str:
        return f"PLAIT_{self.module.upper()}_"


SERVICES: Final[Mapping[str, Service]] = MappingProxyType(
    {
        service.name: service
        for service in (
            Service(name=FEATURE_RETRIEVAL, module="feature_retrieval"),
            Service(name=MODEL_WORKER, module="model_worker"),
            Service(name=ROUTER, module="router"),
        )
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """What the services must agree on. Addresses are "host:port"; the DSN, the URL, the token and the key are secrets. `artifact_cache` is a folder."""

    postgres_dsn: str
    redis_url: str
    service_token: str
    privacy_key: str
    feature_retrieval: str
    model_worker: str
    artifact_cache: str


def settings(service: Service, ties: Ties) -> dict[str, str]:
    """Return the environment that ties one service to the others and to its stores."""
    common = {"RPC__SERVICE_TOKEN": ties.service_token, "REGISTRY__DSN": ties.postgres_dsn}
    own: dict[str, dict[str, str]] = {
        FEATURE_RETRIEVAL: {"REDIS__URL": ties.redis_url, "PRIVACY__KEY": ties.privacy_key},
        MODEL_WORKER: {"ARTIFACTS__CACHE": ties.artifact_cache},
        ROUTER: {
            "REDIS__URL": ties.redis_url,
            "JOURNAL__KEY": hmac.digest(ties.privacy_key.encode(), b"exposures", "sha256").hex(),  # who has it cannot sign erasures
            "FEATURES__ADDRESSES": ties.feature_retrieval,
            "FEATURES__CHANNEL__SERVICE_TOKEN": ties.service_token,
            "WORKERS__ADDRESSES": ties.model_worker,
            "WORKERS__CHANNEL__SERVICE_TOKEN": ties.service_token,
        },
    }
    return {service.prefix + name: value for name, value in (common | own[service.name]).items()}
