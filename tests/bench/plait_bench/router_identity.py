"""What it costs to know who calls, by each credential, in microseconds of the thread that does it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from plait.registry.policies import WorkloadIdentity
from plait.registry.records import ApiKey, Tenant
from plait.rpc.credentials import Authenticator, new_key
from plait.rpc.identity.tokens import Tokens
from plait.rpc.identity.workloads import Workloads
from plait.settings import JwtIssuer

_ISSUER: Final = "https://issuer.example"
_SPIFFE: Final = "spiffe://domain.example/ns/shop/sa/feed"
_BATCH: Final = 500
_NEW: Final = "a new token"


class _Certified:
    """What of a call's context says whose certificate it is; reading it out of TLS costs as much again, on the server's side."""

    def auth_context(self) -> Mapping[str, Any]:
        return {"peer_spiffe_id": [_SPIFFE.encode()]}


def measure(batches: int) -> dict[str, float]:
    """Return microseconds a call by credential: the median batch of 500 calls."""
    private = ec.generate_private_key(ec.SECP256R1())
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(json.dumps({"keys": [ECAlgorithm.to_jwk(private.public_key(), as_dict=True) | {"kid": "k"}]}))
        settings = JwtIssuer(issuer=_ISSUER, audience="plait", jwks=str(keys), algorithms=("ES256",))
        tokens = asyncio.run(_ready(settings))
    secret, sha256 = new_key()
    key = ApiKey(id="k", tenant="shop", sha256=sha256)
    identities = (
        WorkloadIdentity(spiffe=_SPIFFE, roles=("predict",)),
        WorkloadIdentity(issuer=_ISSUER, subject="feed", roles=("predict",)),
    )
    workloads = Workloads([Tenant(name="shop", identities=identities)])
    who = Authenticator({sha256: key}.get, service_token="t" * 43, workloads=lambda: workloads, tokens=tokens)

    def token(number: int) -> str:
        said = {"iss": _ISSUER, "aud": "plait", "sub": "feed", "exp": time.time() + 3600, "jti": str(number)}
        return f"Bearer {jwt.encode(said, private, algorithm='ES256', headers={'kid': 'k'})}"

    agent, signed = ("user-agent", "grpc"), token(0)
    sent = {
        "a service token": (agent, ("x-plait-service-token", "t" * 43), ("x-plait-tenant", "shop")),
        "an API key": (agent, ("authorization", f"Bearer {secret}")),
        "a token": (agent, ("authorization", signed)),
        "a certificate": (agent,),
    }
    found = {name: _median_us(who, [metadata] * _BATCH, batches) for name, metadata in sent.items()}
    return found | {_NEW: _median_us(who, [(agent, ("authorization", token(number))) for number in range(1, 101)], 1)}


async def _ready(settings: JwtIssuer) -> Tokens:
    tokens = Tokens((settings,))
    reading = tokens.issuers[_ISSUER].look()
    if reading is not None:
        await reading
    return tokens


def _median_us(who: Authenticator, calls: list[tuple[tuple[str, str], ...]], batches: int) -> float:
    context, took_us = _Certified(), []
    for _ in range(batches):
        began = time.perf_counter()
        for metadata in calls:
            who.identify(metadata, "rank", context)
        took_us.append((time.perf_counter() - began) / len(calls) * 1e6)
    return sorted(took_us)[len(took_us) // 2]
