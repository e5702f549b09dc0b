"""Who may call: a service token among ourselves; API keys, tokens and certificates for the outside.

A key is 256 random bits, so a plain SHA-256 is enough to store it by: there is nothing to guess, and nothing slow on the hot path.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from plait.errors import PermissionDenied, Unauthenticated
from plait.rpc.identity.forwarded import FORWARDED_HEADER, last_uris
from plait.rpc.identity.issuers import Issuer
from plait.rpc.identity.roles import granted, roles_with
from plait.rpc.identity.workloads import SPIFFE, Grant, Workloads

if TYPE_CHECKING:
    from plait.rpc.identity.tokens import Tokens

API_KEY_HEADER: Final = "x-api-key"
AUTHORIZATION_HEADER: Final = "authorization"
SERVICE_TOKEN_HEADER: Final = "x-plait-service-token"  # noqa: S105  (a header's name)
TENANT_HEADER: Final = "x-plait-tenant"
DEFAULT_TENANT: Final = "default"
_KEY_PREFIX: Final = "plait_"
_BEARER: Final = "bearer "
_MAX_KEY_CHARS: Final = 256
_DOTS: Final = 2  # in a token, never in a key
_PEER_SPIFFE_ID: Final = "peer_spiffe_id"  # gRPC's core fills it in where a verified certificate has exactly one URI, and that one is valid
_LEARN_S: Final = 1.0  # longest that a call waits for an issuer of tokens to tell its keys

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


@dataclass(slots=True, kw_only=True)  # nobody changes it; frozen would triple the cost of making one, and one is made per call
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

    `find_key` looks a SHA-256 up in the current snapshot, so that a revoked key is refused as soon as the snapshot is swapped; `workloads` gives
    the identities of tenants in it. `tokens` verifies JWTs, None = none are taken. `trusted_proxies`: SPIFFE ids of those who may tell whose
    certificate they saw.

    Every credential that is sent must be right, whichever of them decides: a service's token, an API key, a token, a certificate, in this
    order. With `required` off (only sensible on loopback or behind a mesh) callers without credentials are let in as the default tenant.
    """

    def __init__(
        self,
        find_key: Callable[[str], KeyRecord | None],
        *,
        service_token: str = "",
        required: bool = True,
        workloads: Callable[[], Workloads] = Workloads,
        tokens: Tokens | None = None,
        trusted_proxies: Collection[str] = (),
    ) -> None:
        self._find_key = find_key
        self._service_token = service_token.encode()
        self._required = required
        self._workloads = workloads
        self._tokens = tokens
        self._trusted_proxies = frozenset(trusted_proxies)

    def identify(self, metadata: Metadata, scope: str, context: Any = None, *, last: bool = False) -> Identity:
        """Return who is calling. `scope` is what the method asks for; a service has every scope. `context`: the call's, for its certificate.

        Raises KeyUnknown where a token's key is not known, unless this is the `last` try (see `learn`).
        """
        key = bearer = token = tenant = forwarded = ""
        for name, value in metadata:
            if name == SERVICE_TOKEN_HEADER:
                token = str(value)
            elif name == API_KEY_HEADER:
                key = str(value)
            elif name == AUTHORIZATION_HEADER:
                text = str(value)
                bearer = text[len(_BEARER) :].strip() if text[: len(_BEARER)].lower() == _BEARER else ""
            elif name == TENANT_HEADER:
                tenant = str(value)
            elif name == FORWARDED_HEADER:
                forwarded = f"{forwarded},{value!s}" if forwarded else str(value)
        found = self._service(token, tenant) if token else None
        if key:
            found = found or self._key(key)
        if bearer and not (key and self._tokens is None and not bearer.startswith(_KEY_PREFIX)):  # that one is meant for somebody else
            by_bearer = self._bearer(bearer, last=last)
            found = found or by_bearer
        if found is None and context is not None:
            found = self._workload(context, forwarded)
        if found is None:
            if self._required:
                raise Unauthenticated("no API key: send metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'", reason="API_KEY_MISSING")
            return ANONYMOUS
        if not found.is_service and scope not in found.scopes:
            raise PermissionDenied(
                f"the API key or identity lacks the scope '{scope}': ask for one that has it (role {' or '.join(roles_with(scope))})",
                reason="SCOPE_MISSING",
            )
        return found

    def look(self) -> None:
        """Keep the keys of issuers fresh; called every second."""
        if self._tokens is not None:
            self._tokens.look()

    async def learn(self, issuer: Issuer) -> None:
        """Wait for what an issuer says its keys are, a second at most."""
        reading = issuer.look(unknown=True)
        if reading is not None:
            await asyncio.wait((reading,), timeout=_LEARN_S)

    async def close(self) -> None:
        """Ask no issuer any more."""
        if self._tokens is not None:
            for issuer in self._tokens.issuers.values():
                await issuer.close()

    def _service(self, token: str, tenant: str) -> Identity:
        if not self._service_token or not hmac.compare_digest(token.encode(), self._service_token):
            raise Unauthenticated(
                "the service token is not this service's: give both sides the same rpc.service_token", reason="SERVICE_TOKEN_WRONG"
            )
        return replace(_SERVICE, tenant=tenant) if tenant else _SERVICE

    def _key(self, key: str) -> Identity:
        record = self._find_key(digest(key)) if len(key) <= _MAX_KEY_CHARS else None
        if record is None:
            raise Unauthenticated("the API key is not known or was revoked: ask for a new one", reason="API_KEY_INVALID")
        if record.expires_at and record.expires_at <= time.time():
            raise Unauthenticated("the API key has expired: ask for a new one", reason="API_KEY_EXPIRED")
        return Identity(caller=record.id, tenant=record.tenant, scopes=granted(record.scopes))

    def _bearer(self, bearer: str, *, last: bool) -> Identity:
        if self._tokens is None or bearer.startswith(_KEY_PREFIX) or bearer.count(".") != _DOTS:
            return self._key(bearer)
        claims = self._tokens.verify(bearer, last=last)
        grant = self._workloads().by_token(claims.issuer, claims.subject, claims.tenant)
        if grant is None:
            raise Unauthenticated(
                "the token is valid, but no tenant lists its issuer and subject (and names it, where it names a tenant): see spec.identities",
                reason="WORKLOAD_UNKNOWN",
            )
        named = hashlib.blake2b(f"{claims.issuer} {claims.subject}".encode(), digest_size=6).hexdigest()  # a subject may be a person
        return Identity(caller=f"token-{named}", tenant=grant.tenant, scopes=grant.within(claims.roles))

    def _workload(self, context: Any, forwarded: str) -> Identity | None:
        """Return whose certificate this is, or, from a trusted proxy, whose the proxy says it saw; None where there is none."""
        ids = context.auth_context().get(_PEER_SPIFFE_ID, ())
        spiffe = ids[0].decode(errors="replace") if len(ids) == 1 else ""
        if spiffe in self._trusted_proxies and forwarded:
            uris = [uri for uri in last_uris(forwarded) if uri.startswith(SPIFFE)]
            spiffe = uris[0] if len(uris) == 1 else ""
            grant = self._workloads().by_spiffe(spiffe) if spiffe else None
            if grant is None:
                raise _unknown_workload()
            return _as(spiffe, grant)
        if not spiffe:
            return None
        grant = self._workloads().by_spiffe(spiffe)
        if grant is None:
            if self._required:
                raise _unknown_workload()
            return None
        return _as(spiffe, grant)


def _as(spiffe: str, grant: Grant) -> Identity:
    return Identity(caller=spiffe, tenant=grant.tenant, scopes=grant.scopes)


def _unknown_workload() -> Unauthenticated:
    return Unauthenticated(
        "the certificate is valid, but no tenant lists its SPIFFE id (spec.identities), and no API key was sent", reason="WORKLOAD_UNKNOWN"
    )
