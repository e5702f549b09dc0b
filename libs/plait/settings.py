"""Settings every service shares, and how they are read: environment over file over defaults, refused at start when wrong.

Names: PLAIT_<SERVICE>_<GROUP>__<FIELD>, for example PLAIT_ROUTER_RPC__PORT. PLAIT_<SERVICE>_CONFIG names a YAML file of the same tree.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class SettingsError(Exception):
    """Settings that cannot be used; the message lists every bad one by name, with its value and what was expected."""


class Group(BaseModel):
    """A named slice of the settings; a part of a service takes only its slice."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class JwtIssuer(Group):
    """Whose tokens are believed, and what is read out of them."""

    issuer: str = Field(min_length=1, description="who issues them, exactly as in the claim iss")
    audience: str = Field(min_length=1, description="whom they are for: one of the claim aud must be this")
    jwks: str = Field(min_length=1, description="the issuer's public keys: an https:// address or a file")
    jwks_ca: Path | None = Field(None, description="PEM roots that the https:// address must chain to; default: the system's")
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"], ...] = Field(
        ("RS256", "ES256"), min_length=1, description="algorithms that its signatures may use"
    )
    tenant_claim: str = Field("tenant", min_length=1, description="claim that names the tenant; without it the tenant's manifest says")
    roles_claim: str = Field("roles", min_length=1, description="claim that lists roles, which narrow those of the tenant's manifest")
    leeway_s: float = Field(30.0, ge=0, le=300, description="how far clocks may be apart, seconds")

    @field_validator("jwks")
    @classmethod
    def _safe(cls, value: str) -> str:
        if "://" in value and not value.startswith("https://"):
            raise ValueError("expected an https:// address or a file: who can change the keys on their way can forge tokens")
        return value


class JwtSettings(Group):
    """Tokens (JWT) instead of API keys."""

    issuers: tuple[JwtIssuer, ...] = Field(
        (), description="JSON list of {issuer, audience, jwks, jwks_ca, algorithms, tenant_claim, roles_claim, leeway_s}; none = no tokens"
    )

    @model_validator(mode="after")
    def _different(self) -> JwtSettings:
        if len({issuer.issuer for issuer in self.issuers}) < len(self.issuers):
            raise ValueError("an issuer is listed twice")
        return self


class RpcSettings(Group):
    """How a service listens."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; anything but loopback needs require_auth (or a mesh, see allow_insecure)"
    )
    port: int = Field(0, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    port_file: Path | None = Field(None, description="file that receives the listening addresses as JSON once the service is SERVING")
    max_message_bytes: int = Field(16 * 1024 * 1024, ge=1024, le=1 << 30, description="largest message taken or sent, bytes")
    max_in_flight: int = Field(1024, ge=1, description="calls under way at once, per process; more are answered RESOURCE_EXHAUSTED")
    default_timeout_s: float = Field(10.0, gt=0, le=3600, description="budget of a call whose caller set no deadline, seconds")
    grace_s: float = Field(10.0, ge=0, le=600, description="time that held calls have to finish after SIGTERM, seconds")
    settle_s: float = Field(
        0.0, ge=0, le=60, description="time between NOT_SERVING and refusing new calls, so that balancers notice, seconds"
    )
    server: Literal["core", "aio"] = Field(
        "core", description="what takes calls: plait's own loop on gRPC's core, or grpc.aio, which needs several times the CPU per call"
    )
    require_auth: bool = Field(True, description="refuse calls without an API key or service token (health and reflection stay open)")
    allow_insecure: bool = Field(
        False, description="listen beyond loopback although require_auth is off, because something else guards the port"
    )
    service_token: SecretStr = Field(
        SecretStr(""), description="shared secret of plait services among themselves; empty = no service is trusted"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain to serve TLS with; needs tls_key")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")
    tls_client_ca: Path | None = Field(None, description="PEM roots that client certificates must chain to (mutual TLS)")
    trusted_proxies: tuple[str, ...] = Field(
        (), description="JSON list of SPIFFE ids of proxies whose x-forwarded-client-cert says who calls; needs tls_client_ca"
    )
    jwt: JwtSettings = Field(default_factory=JwtSettings, description="tokens of other issuers")

    @model_validator(mode="after")
    def _guarded(self) -> RpcSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: set both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.trusted_proxies and self.tls_client_ca is None:
            raise ValueError("trusted_proxies needs tls_client_ca: a proxy proves itself by its certificate")
        if self.host not in _LOOPBACK and not self.require_auth and not self.allow_insecure:
            raise ValueError(
                "host is not loopback and require_auth is off: set require_auth=true, or allow_insecure=true if a mesh guards the port"
            )
        return self


class ChannelSettings(Group):
    """How a service calls another one."""

    service_token: SecretStr = Field(SecretStr(""), description="shared secret sent to the other service")
    max_message_bytes: int = Field(16 * 1024 * 1024, ge=1024, le=1 << 30, description="largest message taken or sent, bytes")
    tls: bool = Field(False, description="call over TLS")
    tls_ca: Path | None = Field(None, description="PEM roots the server must chain to; default: the system's")
    tls_cert: Path | None = Field(None, description="PEM client certificate (mutual TLS); needs tls_key")
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert")

    @model_validator(mode="after")
    def _complete(self) -> ChannelSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: set both or neither")
        if self.tls_ca is not None and not self.tls:
            raise ValueError("tls_ca is set but tls is off, so it would be ignored: set tls=true")
        return self


class TelemetrySettings(Group):
    """What a service tells about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level that is logged")
    log_format: Literal["json", "console"] = Field("json", description="json lines for machines, or coloured lines for people")
    trace_exporter: Literal["none", "otlp", "console"] = Field("none", description="where spans go; none also skips creating them")
    otlp_endpoint: str = Field("http://127.0.0.1:4317", description="OTLP/gRPC collector, as http(s)://host:port")
    trace_sample_ratio: float = Field(
        0.01, ge=0, le=1, description="share of traces started here that are recorded; a caller's decision is kept"
    )
    metrics_host: str = Field("127.0.0.1", description="address the Prometheus endpoint listens on")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Prometheus endpoint (0 picks a free one); unset = no endpoint"
    )
    metrics_tls_cert: Path | None = Field(None, description="PEM certificate chain of the Prometheus endpoint; needs metrics_tls_key")
    metrics_tls_key: Path | None = Field(None, description="PEM private key of metrics_tls_cert")
    metrics_tls_client_ca: Path | None = Field(None, description="PEM roots that Prometheus' own certificate must chain to (mutual TLS)")

    @model_validator(mode="after")
    def _complete(self) -> TelemetrySettings:
        if (self.metrics_tls_cert is None) != (self.metrics_tls_key is None):
            raise ValueError("metrics_tls_cert and metrics_tls_key go together: set both or neither")
        if self.metrics_tls_client_ca is not None and self.metrics_tls_cert is None:
            raise ValueError("metrics_tls_client_ca needs metrics_tls_cert and metrics_tls_key")
        return self


class RegistrySettings(Group):
    """Where a service learns what to serve."""

    dsn: SecretStr = Field(SecretStr(""), description="Postgres of the registry, as postgresql://user:password@host:port/database")
    last_known_good: Path | None = Field(None, description="file that keeps the last snapshot, to start from when Postgres is away")
    poll_s: float = Field(
        0.5, gt=0, description="how often to look for changes besides listening, seconds; a revoked key is refused after this long at most"
    )
    first_snapshot_timeout_s: float = Field(
        10.0, gt=0, description="how long to wait for Postgres at start before the file is used, seconds"
    )


class ServiceSettings(BaseSettings):
    """Base of each service's settings; subclasses set `env_prefix` and add their own groups."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_nested_delimiter="__", validate_default=True)

    rpc: RpcSettings = Field(default_factory=RpcSettings, description="how the service listens")
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings, description="logs, traces, metrics")
    registry: RegistrySettings = Field(default_factory=RegistrySettings, description="where the snapshot comes from")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment wins over what `load` read from the file."""
        return (env_settings, init_settings)


S = TypeVar("S", bound=ServiceSettings)


def load(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Read settings of `cls` from the environment and its file; raise SettingsError naming every setting that is wrong or unknown."""
    environ = os.environ if environ is None else environ
    prefix = str(cls.model_config.get("env_prefix", ""))
    known = {name for name, _ in fields(cls)}
    unknown = [
        name for name in environ if name.upper().startswith(prefix) and name.upper() not in known and name.upper() != f"{prefix}CONFIG"
    ]
    problems = [_unknown_setting(name, known) for name in sorted(unknown)]
    try:
        settings = cls(**_read_file(environ.get(f"{prefix}CONFIG"), f"{prefix}CONFIG"))
    except ValidationError as error:
        problems += [
            _describe(cls, prefix, dict(detail)) for detail in error.errors(include_url=False) if not _is_env_extra(dict(detail), prefix)
        ]
        raise SettingsError(_listing(problems)) from None
    except ValueError as error:  # a nested group given as something that is not JSON
        raise SettingsError(_listing([*problems, str(error)])) from None
    if problems:
        raise SettingsError(_listing(problems))
    return settings


def fields(cls: type[BaseModel], prefix: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield (environment name, "meaning (default: …)") of every setting of `cls`."""
    prefix = str(cls.model_config.get("env_prefix", "")) if prefix is None else prefix
    for name, info in cls.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Group):
            yield from fields(info.annotation, f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}", f"{info.description} (default: {info.get_default(call_default_factory=True)!r})"


def _read_file(path: str | None, setting: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}={path!r}: cannot be read: {error}") from None
    except yaml.YAMLError as error:  # which would show the line, and with it perhaps a secret
        mark = getattr(error, "problem_mark", None)
        place = f": see line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{setting}={path!r}: cannot be read as YAML{place}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{setting}={path!r}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def _is_env_extra(detail: dict[str, Any], prefix: str) -> bool:
    """Unknown top-level names of the environment are reported by `load` itself, with a suggestion."""
    return detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1 and str(detail["loc"][0]).upper().startswith(prefix)


def _describe(cls: type[BaseModel], prefix: str, detail: dict[str, Any]) -> str:
    model: type[BaseModel] = cls
    meaning = ""
    harmless = False
    for part in detail["loc"]:
        info = model.model_fields.get(str(part)) if isinstance(part, str) else None
        if info is None:
            harmless = harmless and isinstance(part, int)  # an unknown name may be a secret's, mistyped
            break
        group = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        meaning, harmless = info.description or "", not group and "Secret" not in str(info.annotation)  # a group's text may hold any
        if isinstance(info.annotation, type) and group:
            model = info.annotation
    name = prefix + "__".join(str(part).upper() for part in detail["loc"])
    value = detail.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f"={value!r}" if harmless else "=<hidden>"
    expected = str(detail["msg"]).removeprefix("Value error, ")
    return f"{name}{shown}: {expected}" + (f" ({meaning})" if meaning else "")


def _unknown_setting(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.upper(), known, n=1)
    return f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else "")


def _listing(problems: list[str]) -> str:
    return "settings cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems)
