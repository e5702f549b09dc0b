"""Who is let in, and who is not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from plait.errors import PermissionDenied, Unauthenticated
from plait.registry.records import ApiKey
from plait.rpc.credentials import Authenticator, digest, new_key

SECRET, SHA = new_key()
KEY = ApiKey(id="k1", tenant="shop", sha256=SHA, scopes=("rank",))


def authenticator(key: ApiKey | None = KEY, **kwargs: Any) -> Authenticator:
    keys = {key.sha256: key} if key else {}
    return Authenticator(keys.get, service_token=kwargs.pop("service_token", "t0ken"), **kwargs)


@pytest.mark.parametrize(
    "metadata",
    [(("authorization", f"Bearer {SECRET}"),), (("authorization", f"bearer  {SECRET}"),), (("x-api-key", SECRET),)],
)
def test_a_key_gives_its_tenant(metadata: Any) -> None:
    identity = authenticator().identify(metadata, "rank")
    assert (identity.caller, identity.tenant, identity.is_service) == ("k1", "shop", False)


def test_a_key_cannot_choose_its_tenant() -> None:
    identity = authenticator().identify((("x-api-key", SECRET), ("x-plait-tenant", "other")), "rank")
    assert identity.tenant == "shop"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "API_KEY_MISSING"),
        ((("authorization", SECRET),), "API_KEY_MISSING"),
        ((("x-api-key", "plait_wrong"),), "API_KEY_INVALID"),
        ((("x-api-key", "x" * 10_000),), "API_KEY_INVALID"),
        ((("x-api-key", SHA),), "API_KEY_INVALID"),
        ((("x-plait-service-token", "wrong"),), "SERVICE_TOKEN_WRONG"),
        ((("x-plait-service-token", "wrong"), ("x-api-key", SECRET)), "SERVICE_TOKEN_WRONG"),
    ],
)
def test_who_is_refused_learns_why_but_not_what(metadata: Any, reason: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        authenticator().identify(metadata, "rank")
    assert caught.value.reason == reason
    assert SECRET not in str(caught.value)


def test_expired_and_short_of_scope() -> None:
    old = ApiKey(id="k1", tenant="shop", sha256=SHA, scopes=("rank",), expires_at=time.time() - 1)
    with pytest.raises(Unauthenticated, match="expired"):
        authenticator(old).identify((("x-api-key", SECRET),), "rank")
    with pytest.raises(PermissionDenied, match="'features'"):
        authenticator().identify((("x-api-key", SECRET),), "features")


def test_a_service_acts_for_the_tenant_it_names() -> None:
    identity = authenticator().identify((("x-plait-service-token", "t0ken"), ("x-plait-tenant", "shop")), "features")
    assert (identity.is_service, identity.tenant) == (True, "shop")


def test_without_a_configured_token_no_service_is_trusted() -> None:
    for token in ("", "t0ken"):
        with pytest.raises(Unauthenticated):
            authenticator(service_token="").identify((("x-plait-service-token", token),), "rank")


def test_not_required_lets_strangers_in_but_not_wrong_keys() -> None:
    lax = authenticator(required=False)
    assert lax.identify((), "rank").tenant == "default"
    with pytest.raises(Unauthenticated):
        lax.identify((("x-api-key", "nope"),), "rank")


def test_keys_are_random_and_stored_by_digest() -> None:
    assert new_key()[0] != SECRET
    assert digest(SECRET) == SHA
    assert len(SECRET) > 40
