"""Where a service's Redis is, and how it is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from plait.settings import Group


class RedisSettings(Group):
    """A Redis, however many servers it is made of."""

    url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis:// or rediss:// (TLS) URL of the server; of a cluster, its first one; with Sentinel only how to log in counts",
    )
    mode: Literal["single", "sentinel", "cluster"] = Field("single", description="one server, what Sentinel names, or a Redis Cluster")
    nodes: str = Field("", description="host:port,host:port: the Sentinels, or further servers of the cluster to ask at start")
    sentinel_service: str = Field("", description="name by which the Sentinels know the primary")
    sentinel_password: SecretStr = Field(SecretStr(""), description="password of the Sentinels themselves; empty = none")
    tls_ca: Path | None = Field(None, description="PEM roots that rediss:// servers must chain to; default: the system's")
    tls_cert: Path | None = Field(None, description="PEM client certificate (mutual TLS); needs tls_key")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
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

    @field_validator("nodes")
    @classmethod
    def _addresses(cls, nodes: str) -> str:
        for node in filter(None, nodes.split(",")):
            try:
                parts = urlsplit(f"//{node.strip()}")
                usable = bool(parts.hostname) and bool(parts.port) and parts.netloc == node.strip() and "@" not in node
            except ValueError:
                usable = False
            if not usable:
                raise ValueError("expected host:port,host:port and nothing else; passwords belong into url and sentinel_password")
        return nodes

    @model_validator(mode="after")
    def _complete(self) -> RedisSettings:
        if self.mode == "sentinel" and not (self.node_list and self.sentinel_service):
            raise ValueError("mode=sentinel needs nodes (the Sentinels, host:port,…) and sentinel_service")
        if self.mode == "cluster" and urlsplit(self.url.get_secret_value()).path not in ("", "/", "/0"):
            raise ValueError("a Redis Cluster has database 0 only: leave the database out of url")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: set both or neither")
        if self.tls_ca is not None and not self.url.get_secret_value().startswith("rediss://"):
            raise ValueError("tls_ca is set but url is not rediss://, so it would be ignored")
        return self

    @property
    def node_list(self) -> tuple[str, ...]:
        """The addresses in `nodes`."""
        return tuple(node.strip() for node in self.nodes.split(",") if node.strip())
