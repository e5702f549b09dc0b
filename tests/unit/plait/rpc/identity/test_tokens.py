"""Tokens: each way of forging or misusing one is refused, with one reason and none of its content; keys rotate and issuers go away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.fakes.authority import Authority
from tests.fakes.jwks_issuer import AUDIENCE, ISSUER, JwksIssuer, Key, encoded

from plait.errors import PermissionDenied, Unauthenticated
from plait.registry.policies import WorkloadIdentity
from plait.registry.records import Tenant
from plait.rpc.credentials import Authenticator
from plait.rpc.identity import issuers
from plait.rpc.identity.issuers import Issuer, KeyUnknown
from plait.rpc.identity.tokens import Tokens
from plait.rpc.identity.workloads import Workloads
from plait.settings import JwtIssuer

RSA, EC, ED = Key("RS256", "rsa"), Key("ES256", "ec"), Key("EdDSA", "ed")
OTHER = Key("RS256", "rsa")  # another's key under the same id
NOW = time.time()  # a whole run of tests may lie between this and a test


def settings(jwks: str, **changes: Any) -> JwtIssuer:
    return JwtIssuer(**({"issuer": ISSUER, "audience": AUDIENCE, "jwks": jwks, "algorithms": ("RS256", "ES256", "EdDSA")} | changes))


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [key.jwk for key in (RSA, EC, ED)]}))
    return path


async def ready(*issuers: JwtIssuer, clock: Callable[[], float] = time.time) -> Tokens:
    tokens = Tokens(issuers, clock)
    for issuer in tokens.issuers.values():
        reading = issuer.look()
        assert reading is not None
        await reading
    return tokens


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=lambda key: key.algorithm)
async def test_a_good_token_says_who_it_is(jwks: Path, key: Key) -> None:
    tokens = await ready(settings(str(jwks)))
    claims = tokens.verify(key.sign(tenant="shop", roles=["predict"], aud=["else", AUDIENCE]))
    assert (claims.issuer, claims.subject, claims.tenant, claims.roles) == (ISSUER, "svc-feed", "shop", ("predict",))
    plain = tokens.verify(key.sign())
    assert (plain.tenant, plain.roles) == ("", None)
    assert tokens.verify(key.sign(roles="predict publish")).roles == ("predict", "publish")


def spliced(token: str, *, header: dict[str, Any] | None = None, claims: dict[str, Any] | None = None) -> str:
    """Change parts of a token and keep its signature."""
    first, second, third = token.split(".")
    return ".".join((encoded(header) if header else first, encoded(claims) if claims else second, third))


def confused() -> str:
    """HS256 with the public key, which everybody knows, as the secret."""
    secret = RSA.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{encoded({'alg': 'HS256', 'kid': 'rsa'})}.{encoded(good())}"
    return f"{signed}.{encoded(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def good(**changes: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "svc-feed", "exp": NOW + 86_400} | changes


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "no signature": (lambda: RSA.sign().rpartition(".")[0] + ".", "TOKEN_INVALID"),
    "alg none": (lambda: f"{encoded({'alg': 'none'})}.{encoded(good())}.", "TOKEN_INVALID"),
    "alg None in capitals": (lambda: f"{encoded({'alg': 'NONE', 'kid': 'rsa'})}.{encoded(good())}.", "TOKEN_INVALID"),
    "no alg": (lambda: spliced(RSA.sign(), header={"kid": "rsa"}), "TOKEN_INVALID"),
    "alg a list": (lambda: spliced(RSA.sign(), header={"alg": ["RS256"], "kid": "rsa"}), "TOKEN_INVALID"),
    "HS256 with the public key": (confused, "TOKEN_INVALID"),
    "an algorithm not listed": (lambda: Key("RS512", "rsa").sign(), "TOKEN_INVALID"),
    "EC said to be RSA": (lambda: spliced(EC.sign(), header={"alg": "RS256", "kid": "ec"}), "TOKEN_INVALID"),
    "RSA said to be EC": (lambda: spliced(RSA.sign(), header={"alg": "ES256", "kid": "rsa"}), "TOKEN_INVALID"),
    "another's key under the same id": (OTHER.sign, "TOKEN_INVALID"),
    "its own key in the header": (lambda: OTHER.sign(header={"jwk": OTHER.jwk}), "TOKEN_INVALID"),
    "keys from elsewhere": (lambda: OTHER.sign(header={"jku": "https://evil.example/keys"}), "TOKEN_INVALID"),
    "a certificate from elsewhere": (lambda: OTHER.sign(header={"x5u": "https://evil.example/cert"}), "TOKEN_INVALID"),
    "an unknown key": (lambda: OTHER.sign(header={"kid": "gone"}), "TOKEN_INVALID"),
    "no key id": (lambda: spliced(RSA.sign(), header={"alg": "RS256"}), "TOKEN_INVALID"),
    "a key id that is no text": (lambda: spliced(RSA.sign(), header={"alg": "RS256", "kid": 7}), "TOKEN_INVALID"),
    "critical extensions": (lambda: RSA.sign(header={"crit": ["b64"], "b64": False}), "TOKEN_INVALID"),
    "changed claims": (lambda: spliced(RSA.sign(), claims=good(sub="admin")), "TOKEN_INVALID"),
    "another audience": (lambda: RSA.sign(aud="elsewhere"), "TOKEN_INVALID"),
    "no audience": (lambda: RSA.sign(aud=None), "TOKEN_INVALID"),
    "no expiry": (lambda: RSA.sign(exp=None), "TOKEN_INVALID"),
    "no subject": (lambda: RSA.sign(sub=None), "TOKEN_INVALID"),
    "an empty subject": (lambda: RSA.sign(sub=""), "TOKEN_INVALID"),
    "a long subject": (lambda: RSA.sign(sub="x" * 257), "TOKEN_INVALID"),
    "not yet valid": (lambda: RSA.sign(nbf=NOW + 86_400), "TOKEN_INVALID"),
    "issued in the future": (lambda: RSA.sign(iat=NOW + 86_400), "TOKEN_INVALID"),
    "an expiry that is no number": (lambda: RSA.sign(good(exp="soon")), "TOKEN_INVALID"),
    "a tenant that is no text": (lambda: RSA.sign(tenant=["shop"]), "TOKEN_INVALID"),
    "roles that are no texts": (lambda: RSA.sign(roles=[1]), "TOKEN_INVALID"),
    "roles that are a mapping": (lambda: RSA.sign(roles={"admin": True}), "TOKEN_INVALID"),
    "expired": (lambda: RSA.sign(exp=NOW - 60), "TOKEN_EXPIRED"),
    "another issuer": (lambda: RSA.sign(iss="https://evil.example"), "TOKEN_ISSUER_UNKNOWN"),
    "no issuer": (lambda: RSA.sign(iss=None), "TOKEN_ISSUER_UNKNOWN"),
    "an issuer that is a list": (
        lambda: f"{encoded({'alg': 'RS256', 'kid': 'rsa'})}.{encoded(good(iss=[ISSUER]))}.AA",
        "TOKEN_ISSUER_UNKNOWN",
    ),
    "too long": (lambda: RSA.sign(more="x" * 9000), "TOKEN_INVALID"),
    "no JSON": (lambda: f"{encoded(b'{')}.{encoded(good())}.AA", "TOKEN_INVALID"),
    "JSON that is no object": (lambda: f"{encoded([])}.{encoded([])}.AA", "TOKEN_INVALID"),
    "JSON too deep": (lambda: f"{encoded(b'[' * 3000)}.{encoded(good())}.AA", "TOKEN_INVALID"),
    "not base64": (lambda: "a!b.c!d.e!f", "TOKEN_INVALID"),
    "not ASCII": (lambda: RSA.sign().replace("a", "ä"), "TOKEN_INVALID"),
    "nothing": (lambda: "..", "TOKEN_INVALID"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused_and_its_content_repeated_nowhere(jwks: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, reason = BAD[name]
    tokens = await ready(settings(str(jwks)))
    with pytest.raises(Unauthenticated) as caught:
        tokens.verify(make(), last=True)
    assert caught.value.reason == reason
    assert not {"svc-feed", "evil", ISSUER} & {*str(caught.value).split()}
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "svc-feed" not in "".join(capsys.readouterr())


async def test_secret_and_encryption_keys_of_an_issuer_are_of_no_use(tmp_path: Path) -> None:
    oct_key = {"kty": "oct", "kid": "s", "k": encoded(b"x" * 32), "alg": "HS256"}
    enc = RSA.jwk | {"use": "enc", "kid": "e"}
    other = RSA.jwk | {"alg": "PS256", "kid": "p"}
    path = tmp_path / "jwks"
    path.write_text(json.dumps({"keys": [oct_key, enc, other, "no key"]}))
    tokens = await ready(settings(str(path)))
    for kid in ("s", "e", "p"):
        with pytest.raises(Unauthenticated):
            tokens.verify(RSA.sign(header={"kid": kid}), last=True)


async def test_a_verified_token_costs_no_signature_again_but_ends_when_it_should(jwks: Path) -> None:
    started = time.time()  # (NOW was when the module was read: a whole run of tests ago)
    now = [started]
    tokens = await ready(settings(str(jwks), leeway_s=0), clock=lambda: now[0])
    token = RSA.sign(exp=int(started) + 200)
    first = tokens.verify(token)
    assert tokens.verify(token) is first
    assert "verified=1" in repr(tokens)
    now[0] = started + 201
    assert tokens.verify(token) is not first  # by our clock it is to be verified anew; by the real one it is still good
    assert first.until == pytest.approx(int(started) + 200)


async def test_a_rotated_key_is_found_and_one_taken_back_forgotten(tmp_path: Path) -> None:
    authority = Authority()
    new = Key("RS256", "new")
    with JwksIssuer(authority, tmp_path, RSA) as server:
        made = settings(server.url, jwks_ca=authority.write(tmp_path))
        now = [1000.0]
        tokens = await ready(made)
        issuer = tokens.issuers[ISSUER] = Issuer(made, lambda: now[0])
        reading = issuer.look()
        assert reading is not None
        await reading
        tokens.verify(RSA.sign())
        server.keys = [new]
        with pytest.raises(KeyUnknown):
            tokens.verify(new.sign())
        assert issuer.look(unknown=True) is None  # asked just now
        now[0] += issuers.AGAIN_S
        reading = issuer.look(unknown=True)
        assert reading is not None
        await reading
        assert tokens.verify(new.sign()).subject == "svc-feed"
        with pytest.raises(KeyUnknown):
            tokens.verify(RSA.sign(jti="another"))
        asked = server.asked
        server.status = 500  # the issuer is away: what it said goes on for a day
        now[0] += issuers.REFRESH_S
        reading = issuer.look()
        assert reading is not None
        await reading
        assert server.asked == asked + 1
        assert tokens.verify(new.sign(jti="again")).subject == "svc-feed"
        server.status = 302  # nor does it say where to look instead
        now[0] += issuers.REFRESH_S
        reading = issuer.look()
        assert reading is not None
        await reading
        assert issuer.key("new") is not None
        now[0] += issuers.KEEP_S
        assert issuer.key("new") is None


async def test_a_storm_of_unknown_keys_asks_the_issuer_once(tmp_path: Path) -> None:
    authority = Authority()
    with JwksIssuer(authority, tmp_path, RSA) as server:
        tokens = await ready(settings(server.url, jwks_ca=authority.write(tmp_path)))
        who = Authenticator(lambda _: None, tokens=tokens, workloads=lambda: workloads("predict"))
        assert server.asked == 1

        async def call(number: int) -> str:
            bearer = (("authorization", f"Bearer {OTHER.sign(header={'kid': f'k{number}'})}"),)
            try:
                who.identify(bearer, "rank")
            except KeyUnknown as unknown:
                await who.learn(unknown.issuer)
            with pytest.raises(Unauthenticated) as caught:
                who.identify(bearer, "rank", last=True)
            return caught.value.reason

        assert {*await asyncio.gather(*(call(number) for number in range(50)))} == {"TOKEN_INVALID"}
        assert server.asked == 1
        await who.close()


def workloads(*roles: str, subject: str = "svc-feed") -> Workloads:
    return Workloads([Tenant(name="shop", identities=(WorkloadIdentity(issuer=ISSUER, subject=subject, roles=roles),))])


@pytest.mark.parametrize(
    ("listed", "claims", "scopes"),
    [
        ("svc-feed", {}, {"rank", "infer", "read", "publish"}),
        ("svc-feed", {"tenant": "shop"}, {"rank", "infer", "read", "publish"}),
        ("*", {"tenant": "shop"}, {"rank", "infer", "read", "publish"}),
        ("svc-feed", {"roles": ["publish"]}, {"publish"}),
        ("svc-feed", {"roles": ["admin", "publish"]}, {"publish"}),
        ("svc-feed", {"roles": []}, set()),
        ("svc-feed", {"tenant": "other"}, None),
        ("*", {}, None),
        ("svc-other", {}, None),
    ],
)
async def test_a_tenants_manifest_bounds_what_a_token_may(jwks: Path, listed: str, claims: dict[str, Any], scopes: set[str] | None) -> None:
    tokens = await ready(settings(str(jwks)))
    who = Authenticator(lambda _: None, tokens=tokens, workloads=lambda: workloads("predict", "publish", subject=listed))
    bearer = (("authorization", f"Bearer {RSA.sign(**claims)}"),)
    if scopes is None:
        with pytest.raises(Unauthenticated) as caught:
            who.identify(bearer, "rank")
        assert caught.value.reason == "WORKLOAD_UNKNOWN"
    elif not scopes:
        with pytest.raises(PermissionDenied):
            who.identify(bearer, "rank")
    else:
        identity = who.identify(bearer, min(scopes))
        assert (identity.tenant, {*identity.scopes}) == ("shop", scopes)
        assert "svc-feed" not in identity.caller
