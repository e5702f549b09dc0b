"""Tokens and certificates over the wire: who is let in as whom, through a proxy too, and that nothing of them is told to logs or callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.fakes.authority import Authority
from tests.fakes.jwks_issuer import AUDIENCE, ISSUER, JwksIssuer, Key

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.errors import from_rpc_error
from plait.registry.callers import authenticator
from plait.registry.policies import WorkloadIdentity
from plait.registry.records import ApiKey, Snapshot, Tenant
from plait.rpc.call import current
from plait.rpc.channel import open_channel
from plait.rpc.credentials import new_key
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings

SERVICE = "plait.api.router.v1.RouterService"
FEED, PROXY = "spiffe://td/ns/shop/sa/feed", "spiffe://td/ns/edge/sa/envoy"
SECRET, SHA = new_key()
SHOP = Tenant(
    name="shop",
    identities=(
        WorkloadIdentity(spiffe="spiffe://td/ns/shop/*", roles=("predict",)),
        WorkloadIdentity(issuer=ISSUER, subject="svc-feed", roles=("predict",)),
    ),
)


class Holder:
    """What authentication sees of a watcher."""

    def __init__(self) -> None:
        key = ApiKey(id="k1", tenant="keys", sha256=SHA, scopes=("rank",))
        self.snapshot = Snapshot(tenants={"shop": SHOP}, keys={SHA: key})


class Router(pb_grpc.RouterServiceServicer):
    async def Rank(self, request: Any, context: Any) -> Any:
        return pb.RankResponse(model=current().tenant, variant=current().caller)

    async def Explain(self, request: Any, context: Any) -> Any:
        return pb.ExplainResponse()

    async def RecordOutcome(self, request: Any, context: Any) -> Any:
        return pb.RecordOutcomeResponse()

    async def InvalidateCache(self, request: Any, context: Any) -> Any:
        return pb.InvalidateCacheResponse()

    async def Predict(self, request: Any, context: Any) -> Any:
        return pb.PredictResponse()


@asynccontextmanager
async def serving(holder: Any, **settings: Any) -> AsyncIterator[RpcServer]:
    made = RpcSettings(**({"grace_s": 5} | settings))
    server = RpcServer(made, authenticator=authenticator(made, holder))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, Router(), SERVICE, scope="rank")
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


async def asked(server: RpcServer, settings: ChannelSettings, *metadata: tuple[str, str]) -> str:
    """Return "tenant caller", or the reason of a refusal."""
    async with open_channel(server.address, settings) as channel:
        stub: Any = pb_grpc.RouterServiceStub(channel)
        try:
            answer = await stub.Rank(pb.RankRequest(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            repeated = any(value in str(error) for _, value in metadata if len(value) > 8)
            return "WHAT WAS SENT" if repeated else from_rpc_error(error).reason
        return f"{answer.model} {answer.variant}"


@pytest.mark.parametrize("kind", ["core", "aio"])
async def test_a_certificate_says_who_calls_and_a_proxy_only_if_it_is_trusted(tmp_path: Path, kind: str) -> None:
    authority = Authority()
    ca = authority.write(tmp_path)
    cert, key = authority.issue().write(tmp_path, "server")
    named: dict[str, ChannelSettings] = {}
    uris = {"feed": (FEED,), "proxy": (PROXY,), "other": ("spiffe://td/ns/other/sa/x",), "two": (FEED, PROXY), "none": ()}
    for name, given in uris.items():
        own_cert, own_key = authority.issue(FEED, uris=given).write(tmp_path, name)  # the common name proves nothing
        named[name] = ChannelSettings(tls=True, tls_ca=ca, tls_cert=own_cert, tls_key=own_key)
    forwarded = ("x-forwarded-client-cert", f'By={PROXY};Subject="CN=a";URI={FEED}')
    spoofed = ("x-forwarded-client-cert", f"URI={FEED},URI=spiffe://td/ns/evil/sa/x")
    settings = {"server": kind, "tls_cert": cert, "tls_key": key, "tls_client_ca": ca, "trusted_proxies": (PROXY,)}
    async with serving(Holder(), **settings) as server:
        assert await asked(server, named["feed"]) == f"shop {FEED}"
        assert await asked(server, named["proxy"], forwarded) == f"shop {FEED}"
        assert await asked(server, named["proxy"], spoofed) == "WORKLOAD_UNKNOWN"
        assert await asked(server, named["proxy"], ("x-forwarded-client-cert", f'URI="{FEED}')) == "WORKLOAD_UNKNOWN"
        assert await asked(server, named["proxy"]) == "WORKLOAD_UNKNOWN"
        assert await asked(server, named["other"], forwarded) == "WORKLOAD_UNKNOWN"
        assert await asked(server, named["two"]) == "API_KEY_MISSING"
        assert await asked(server, named["none"], forwarded) == "API_KEY_MISSING"
        assert await asked(server, named["other"], ("x-api-key", SECRET)) == "keys k1"
        assert await asked(server, named["feed"], ("x-api-key", "plait_wrong")) == "API_KEY_INVALID"
        assert await asked(server, named["other"], ("x-api-key", SECRET), forwarded) == "keys k1"
    async with serving(Holder()) as server:  # in clear text nobody has a certificate
        assert await asked(server, ChannelSettings(), forwarded) == "API_KEY_MISSING"
    async with serving(Holder(), require_auth=False, **{**settings, "trusted_proxies": ()}) as server:
        assert await asked(server, named["other"], forwarded) == "default anonymous"
        assert await asked(server, named["feed"]) == f"shop {FEED}"


async def test_a_token_is_let_in_at_its_first_call_and_who_is_taken_out_at_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    authority, holder = Authority(), Holder()
    key = Key("ES256", "e1")
    with JwksIssuer(authority, tmp_path, key) as issuer:
        ca = authority.write(tmp_path)
        jwt = {"issuers": [{"issuer": ISSUER, "audience": AUDIENCE, "jwks": issuer.url, "jwks_ca": ca, "algorithms": ["ES256"]}]}
        async with serving(holder, jwt=jwt) as server:

            async def call(token: str, *more: tuple[str, str]) -> str:
                return await asked(server, ChannelSettings(), ("authorization", f"Bearer {token}"), *more)

            token = key.sign()
            first = await asyncio.gather(*(call(token) for _ in range(8)))  # the keys are read while these wait
            assert {answer.split("-")[0] for answer in first} == {"shop token"}
            assert issuer.asked == 1
            assert await call(SECRET) == "keys k1"
            assert await call(token, ("x-api-key", SECRET)) == "keys k1"
            assert await call(key.sign(exp=1), ("x-api-key", SECRET)) == "TOKEN_EXPIRED"  # a wrong one is never skipped
            assert await call(token, ("x-api-key", "plait_wrong")) == "API_KEY_INVALID"
            assert await call(key.sign(aud="elsewhere")) == "TOKEN_INVALID"
            assert await call(Key("ES256", "e2").sign()) == "TOKEN_INVALID"
            holder.snapshot = Snapshot()
            assert await call(token) == "WORKLOAD_UNKNOWN"
        async with serving(holder) as server:  # who takes no tokens takes it for a key
            assert await asked(server, ChannelSettings(), ("authorization", f"Bearer {token}")) == "API_KEY_INVALID"
    told = "".join(capfd.readouterr())
    assert not [part for part in (token, *token.split("."), "svc-feed", SECRET) if part in told]
