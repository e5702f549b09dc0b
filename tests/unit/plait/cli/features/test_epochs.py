"""`plait features epochs …` on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.registry_world import ITEMS, WORLD
from typer.testing import Result

from plait.registry.manifests import Manifest
from plait.registry.store import Store

Plait = Callable[..., Result]
VIEW = ITEMS.name


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    async def fill() -> None:
        async with await Store.open(postgres_dsn) as store:
            await store.migrate()
            await store.apply([Manifest(record=record) for record in WORLD], actor="me")

    asyncio.run(fill())
    return postgres_dsn


def begin(dsn: str, tenant: str = "default") -> None:
    async def begun() -> None:
        async with await Store.open(dsn) as store:
            await store.begin_epoch(tenant, VIEW, actor="me")

    asyncio.run(begun())


def flip(dsn: str) -> None:
    """What `plait features flip` does in the registry; it also asks the service to carry over, see tests/integration."""

    async def flipped() -> None:
        async with await Store.open(dsn) as store:
            await store.flip_epoch("default", VIEW, actor="me")

    asyncio.run(flipped())


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_from_build_to_retirement(plait: Plait, dsn: str) -> None:
    env = {"PLAIT_POSTGRES_DSN": dsn}
    assert told(plait("features", "epochs", VIEW, "--json", env=env))["serving"] == 0
    begin(dsn)
    assert "epoch 1 is being built" in plait("features", "epochs", VIEW, env=env).stdout
    flip(dsn)
    assert told(plait("features", "epochs", VIEW, "--json", env=env)) == {
        "view": VIEW, "serving": 1, "building": None, "previous": 0, "newest": 1, "built": False,
    }  # fmt: skip
    shown = plait("features", "epochs", VIEW, env=env)
    assert "epoch 1 is served" in shown.stdout
    assert "plait features retire" in shown.stderr  # nobody forgets that every write goes to both
    assert told(plait("features", "rollback", VIEW, "--reason", "wrong", "--json", env=env))["serving"] == 0
    assert told(plait("features", "retire", VIEW, "--json", env=env))["previous"] is None


def test_a_build_is_given_up(plait: Plait, dsn: str) -> None:
    begin(dsn)
    assert told(plait("features", "abandon", VIEW, "--dsn", dsn, "--json"))["building"] is None
    again = plait("features", "abandon", VIEW, "--dsn", dsn)
    assert again.exit_code == 1
    assert "[EPOCH_NOT_FOUND]" in again.stderr


def test_the_tenant_is_that_of_the_key(plait: Plait, dsn: str) -> None:
    async def key() -> str:
        async with await Store.open(dsn) as store:
            _, secret = await store.create_key("shop", actor="me")
            return secret

    begin(dsn, "shop")
    secret = asyncio.run(key())
    assert told(plait("features", "epochs", VIEW, "--json", env={"PLAIT_POSTGRES_DSN": dsn, "PLAIT_API_KEY": secret}))["building"] == 1
    assert told(plait("features", "epochs", VIEW, "--json", "--tenant", "shop", "--dsn", dsn))["building"] == 1
    assert told(plait("features", "epochs", VIEW, "--json", "--dsn", dsn))["building"] is None
    unknown = plait("features", "epochs", VIEW, env={"PLAIT_POSTGRES_DSN": dsn, "PLAIT_API_KEY": "hush"})
    assert "[KEY_NOT_FOUND]" in unknown.stderr
    assert "hush" not in unknown.stderr
