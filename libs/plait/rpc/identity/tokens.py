"""Tokens (JWT, RFC 7519) of issuers that settings name, verified against their published keys; the only module that knows `jwt`.

What a token says of how to verify it is believed in nothing: its algorithm must be one that the issuer's settings list, the key comes from
the issuer's set by its id, and keys in the token itself (`jwk`, `jku`, `x5u`) are never looked at (RFC 8725).
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt

from plait.errors import PlaitError, Unauthenticated
from plait.rpc.identity.issuers import Issuer, Jwk, KeyUnknown
from plait.settings import JwtIssuer

_MAX_CHARS: Final = 8192
_MAX_NAME_CHARS: Final = 256
_CACHED: Final = 10_000
_CACHE_S: Final = 300.0  # so long a verified token is believed after its key was taken back
_KINDS: Final = {"RS": ("RSA", None), "PS": ("RSA", None), "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "EdDSA": ("OKP", "Ed25519")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a verified token says. `tenant` "" and `roles` None where it says nothing. `until`: believed until then, seconds since the epoch."""

    issuer: str
    subject: str
    tenant: str
    roles: tuple[str, ...] | None
    expires: float
    until: float


class Tokens:
    """Verifies tokens; each costs a signature once, and a look-up from then on."""

    def __init__(self, issuers: Sequence[JwtIssuer], clock: Callable[[], float] = time.time) -> None:
        self.issuers = {settings.issuer: Issuer(settings) for settings in issuers}
        self._clock = clock
        self._verified: OrderedDict[bytes, Claims] = OrderedDict()
        self._parsed: dict[tuple[str, str, str], tuple[Jwk, jwt.PyJWK]] = {}
        self._jwt = jwt.PyJWT({"enforce_minimum_key_length": True})

    def __repr__(self) -> str:
        return f"<Tokens issuers={[*self.issuers]} verified={len(self._verified)}>"

    def look(self) -> None:
        """Read the issuers' keys where that is due; called every second."""
        for issuer in self.issuers.values():
            issuer.look()

    def verify(self, token: str, *, last: bool = False) -> Claims:
        """Return what a token says. Raises Unauthenticated (TOKEN_INVALID, TOKEN_EXPIRED, TOKEN_ISSUER_UNKNOWN).

        Raises KeyUnknown where its key is not known, unless this is the `last` try.
        """
        digest = hashlib.sha256(token.encode()).digest()
        known = self._verified.get(digest)
        if known is not None:
            if self._clock() < known.until:
                return known
            del self._verified[digest]
        claims = self._claims(token, last=last)
        if len(self._verified) >= _CACHED:
            self._verified.popitem(last=False)
        self._verified[digest] = claims
        return claims

    def _claims(self, token: str, *, last: bool) -> Claims:
        header, said = _unverified(token)
        issuer = self.issuers.get(said.get("iss")) if isinstance(said.get("iss"), str) else None  # type: ignore[arg-type]
        if issuer is None:
            raise Unauthenticated("the token's issuer is not one of rpc.jwt.issuers", reason="TOKEN_ISSUER_UNKNOWN")
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in issuer.settings.algorithms or "crit" in header or not isinstance(kid, str):
            raise _invalid()
        key = issuer.key(kid)
        if key is None:
            raise _invalid() if last else KeyUnknown(issuer)
        if not _fits(key, algorithm):
            raise _invalid()
        return self._read(issuer.settings, self._verify(token, key, algorithm, issuer.settings))

    def _verify(self, token: str, key: Jwk, algorithm: str, issuer: JwtIssuer) -> dict[str, Any]:
        """Return the claims. What PyJWT says of a failure holds parts of the token, so it goes no further."""
        try:
            return self._jwt.decode(
                token,
                self._parse(key, algorithm, issuer.issuer),
                algorithms=[algorithm],
                audience=issuer.audience,
                issuer=issuer.issuer,
                leeway=issuer.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired: get a new one from its issuer", reason="TOKEN_EXPIRED") from None
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, OverflowError):
            raise _invalid() from None

    def _parse(self, key: Jwk, algorithm: str, issuer: str) -> jwt.PyJWK:
        """Return a key ready for use; parsing it costs as much as verifying with it. There are as many as issuers ever had ids of keys."""
        place = issuer, str(key.get("kid", "")), algorithm
        known = self._parsed.get(place)
        if known is not None and known[0] is key:
            return known[1]
        parsed = jwt.PyJWK(dict(key), algorithm)
        self._parsed[place] = key, parsed
        return parsed

    def _read(self, issuer: JwtIssuer, claims: dict[str, Any]) -> Claims:
        subject, tenant, roles = claims["sub"], claims.get(issuer.tenant_claim, ""), claims.get(issuer.roles_claim)
        if isinstance(roles, str):
            roles = roles.split()
        names = [subject, tenant, *(roles or ())] if isinstance(roles, list | None) else [None]
        if not all(isinstance(name, str) and len(name) <= _MAX_NAME_CHARS for name in names) or not subject:
            raise _invalid()
        expires = float(claims["exp"]) + issuer.leeway_s
        return Claims(
            issuer=issuer.issuer,
            subject=subject,
            tenant=tenant,
            roles=None if roles is None else tuple(roles),
            expires=expires,
            until=min(expires, self._clock() + _CACHE_S),
        )


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the claims of who knows whom, only to find out which issuer's key to try."""
    if len(token) > _MAX_CHARS or not token.isascii():
        raise _invalid()
    try:
        header, claims = (json.loads(_decoded(part)) for part in token.split(".")[:2])
    except (ValueError, RecursionError):
        raise _invalid() from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise _invalid()
    return header, claims


def _decoded(part: str) -> bytes:
    return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)


def _fits(key: Jwk, algorithm: str) -> bool:
    """Say whether a key is for an algorithm: no key is ever used with another kind's."""
    kind, curve = _KINDS.get(algorithm) or _KINDS[algorithm[:2]]
    return key.get("kty") == kind and curve in (None, key.get("crv")) and key.get("alg", algorithm) == algorithm


def _invalid() -> PlaitError:
    return Unauthenticated(
        "the token cannot be used here: is it of the right issuer, for this audience, and signed?", reason="TOKEN_INVALID"
    )
