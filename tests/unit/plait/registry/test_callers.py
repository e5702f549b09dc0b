"""Who may call: looked up in the newest snapshot each time, so that a revoked key does not outlive it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from tests.fakes.router_world import KEY, NARROW_KEY, snapshot

from plait.errors import PermissionDenied, Unauthenticated
from plait.registry.callers import authenticator
from plait.registry.records import Snapshot
from plait.rpc.credentials import ANONYMOUS, digest
from plait.settings import RpcSettings

SCOPE = "rank"


class Holder:
    """What authentication sees of a watcher: the newest snapshot."""

    def __init__(self, newest: Snapshot) -> None:
        self.snapshot = newest


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_a_key_of_the_snapshot_is_its_tenant() -> None:
    watcher: Any = Holder(snapshot())
    identity = authenticator(RpcSettings(), watcher).identify(bearer(KEY), SCOPE)
    assert (identity.caller, identity.tenant, identity.is_service) == ("k1", "shop", False)


def test_a_revoked_key_is_refused_with_the_next_snapshot_and_a_new_one_let_in() -> None:
    watcher: Any = Holder(replace(snapshot(), keys={}))
    who = authenticator(RpcSettings(), watcher)
    with pytest.raises(Unauthenticated) as unknown:
        who.identify(bearer(KEY), SCOPE)
    assert unknown.value.reason == "API_KEY_INVALID"
    assert KEY not in str(unknown.value)
    watcher.snapshot = snapshot()
    assert who.identify(bearer(KEY), SCOPE).tenant == "shop"
    watcher.snapshot = replace(snapshot(), keys={k: v for k, v in snapshot().keys.items() if k != digest(KEY)})
    with pytest.raises(Unauthenticated):
        who.identify(bearer(KEY), SCOPE)


def test_ranking_asks_for_a_scope_that_new_keys_have() -> None:
    watcher: Any = Holder(snapshot())
    assert SCOPE in snapshot().keys[digest(KEY)].scopes
    with pytest.raises(PermissionDenied, match="rank"):
        authenticator(RpcSettings(), watcher).identify(bearer(NARROW_KEY), SCOPE)


@pytest.mark.parametrize("required", [True, False])
def test_callers_without_a_key(required: bool) -> None:
    watcher: Any = Holder(snapshot())
    who = authenticator(RpcSettings(require_auth=required), watcher)
    if required:
        with pytest.raises(Unauthenticated):
            who.identify((), SCOPE)
    else:
        assert who.identify((), SCOPE) == ANONYMOUS
    with pytest.raises(Unauthenticated):
        who.identify(bearer("plait_wrong"), SCOPE)


def test_a_service_is_known_by_the_token_of_the_settings() -> None:
    watcher: Any = Holder(snapshot())
    settings = RpcSettings(service_token=SecretStr("the-token"))
    token = (("x-plait-service-token", "the-token"), ("x-plait-tenant", "shop"))
    identity = authenticator(settings, watcher).identify(token, SCOPE)
    assert (identity.is_service, identity.tenant) == (True, "shop")
    with pytest.raises(Unauthenticated):  # without a token of its own a service trusts none
        authenticator(RpcSettings(), watcher).identify(token, SCOPE)
