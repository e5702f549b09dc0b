"""Who may call: API keys for the outside, a service token among ourselves.

A key is 256 random bits, so a plain SHA-256 is enough to store it by: there is nothing to guess, and nothing slow on the hot path.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from plait.errors import PermissionDenied, Unauthenticated
from plait.rpc.identity.roles import granted, roles_with

API_KEY_HEADER: Final = "x-api-key"
AUTHORIZATION_HEADER: Final = "authorization"
SERVICE_TOKEN_HEADER: Final = "x-plait-service-token"  # noqa: S105  (a header's name)
TENANT_HEADER: Final = "x-plait-tenant"
DEFAULT_TENANT: Final = "default"
_KEY_PREFIX: Final = "plait_"
_BEARER: Final = "bearer "
_MAX_KEY_CHARS: Final = 256

Metadata = Sequence[tuple[str, str | bytes]]


class KeyRecord(Protocol):
    """What authentication needs to know of a key; `registry.records.ApiKey` fits. `expires_at`: seconds since the epoch, 0 = never."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def scopes(self) -> tuple[str, ...]: ...
    @property
    def expires_at(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An authenticated caller."""

    caller: str
    tenant: str
    scopes: frozenset[str]
    is_service: bool = False


_SERVICE: Final = Identity(caller="service", tenant=DEFAULT_TENANT, scopes=frozenset(), is_service=True)
ANONYMOUS: Final = Identity(caller="anonymous", tenant=DEFAULT_TENANT, scopes=granted(("rank", "features", "infer")))


def new_key() -> tuple[str, str]:
    """Return a fresh API key, to be shown once, and the SHA-256 (hex) to store."""
    secret = _KEY_PREFIX + secrets.token_urlsafe(32)
    return secret, digest(secret)


def digest(secret: str) -> str:
    """Return the SHA-256 (hex) a key is stored and looked up by."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Authenticator:
    """Turns call metadata into an identity, or raises Unauthenticated / PermissionDenied.

    `find_key` looks a SHA-256 up in the current snapshot, so that a revoked key is refused as soon as the snapshot is swapped.
    With `required` off (only sensible on loopback or behind a mesh) callers without credentials are let in as the default tenant;
    wrong credentials are refused all the same.
    """

    def __init__(self, find_key: Callable[[str], KeyRecord | None], *, service_token: str = "", required: bool = True) -> None:
        self._find_key = find_key
        self._service_token = service_token.encode()
        self._required = required

    def identify(self, metadata: Metadata, scope: str) -> Identity:
        """Return who is calling. `scope` is what the method asks for; a service has every scope."""
        key = token = tenant = ""
        for name, value in metadata:
            if name == SERVICE_TOKEN_HEADER:
                token = str(value)
            elif name == API_KEY_HEADER:
                key = str(value)
            elif name == AUTHORIZATION_HEADER and not key:
                text = str(value)
                key = text[len(_BEARER) :].strip() if text[: len(_BEARER)].lower() == _BEARER else ""
            elif name == TENANT_HEADER:
                tenant = str(value)
        if token:
            return self._service(token, tenant)
        if key:
            return self._key(key, scope)
        if self._required:
            raise Unauthenticated("no API key: send metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'", reason="API_KEY_MISSING")
        return ANONYMOUS

    def _service(self, token: str, tenant: str) -> Identity:
        if not self._service_token or not hmac.compare_digest(token.encode(), self._service_token):
            raise Unauthenticated(
                "the service token is not this service's: give both sides the same rpc.service_token", reason="SERVICE_TOKEN_WRONG"
            )
        return replace(_SERVICE, tenant=tenant) if tenant else _SERVICE

    def _key(self, key: str, scope: str) -> Identity:
        record = self._find_key(digest(key)) if len(key) <= _MAX_KEY_CHARS else None
        if record is None:
            raise Unauthenticated("the API key is not known or was revoked: ask for a new one", reason="API_KEY_INVALID")
        if record.expires_at and record.expires_at <= time.time():
            raise Unauthenticated("the API key has expired: ask for a new one", reason="API_KEY_EXPIRED")
        scopes = granted(record.scopes)
        if scope not in scopes:
            raise PermissionDenied(
                f"the API key lacks the scope '{scope}': ask for a key that has it (role {' or '.join(roles_with(scope))})",
                reason="SCOPE_MISSING",
            )
        return Identity(caller=record.id, tenant=record.tenant, scopes=scopes)
