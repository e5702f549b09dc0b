"""`plait keys` on a real PostgreSQL."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

Plait = Callable[..., Result]


@pytest.fixture
def plait(plait: Plait, postgres_dsn: str) -> Plait:
    """The command line with a registry behind it."""

    def run(*words: object, **options: Any) -> Result:
        return plait(*words, **{"env": {"PLAIT_POSTGRES_DSN": postgres_dsn}, **options})

    assert run("migrate").exit_code == 0
    return run


def test_a_key_is_shown_once_and_alone_on_stdout(plait: Plait) -> None:
    made = plait("keys", "create", "--role", "predict", "--note", "home page", "--expires", "90d")
    assert made.exit_code == 0, made.output
    assert re.fullmatch(r"plait_[A-Za-z0-9_-]{43}\n", made.stdout)
    assert "may predict" in made.stderr
    listed = plait("keys", "list")
    assert "home page" in listed.stdout
    assert "predict" in listed.stdout
    assert made.stdout.strip() not in listed.stdout + plait("keys", "list", "--json").stdout


def test_rotate_and_revoke(plait: Plait) -> None:
    first = json.loads(plait("keys", "create", "--role", "publish", "--role", "operate", "--json").stdout)
    assert (first["roles"], first["expires_at"]) == (["publish", "operate"], None)
    second = json.loads(plait("keys", "rotate", first["id"], "--overlap", "0s", "--json").stdout)
    assert second["replaces"] == first["id"]
    assert second["key"] != first["key"]
    by_id = {key["id"]: key for key in json.loads(plait("keys", "list", "--json").stdout)}
    assert by_id[first["id"]]["expired"]
    assert not by_id[second["id"]]["expired"]
    assert "(over)" in plait("keys", "list").stdout
    assert plait("keys", "revoke", first["id"], "--reason", "leaked").stdout == f"{first['id']} revoked\n"
    again = plait("keys", "revoke", first["id"])
    assert again.exit_code == 1
    assert "KEY_NOT_FOUND" in again.stderr
    assert json.loads(plait("keys", "revoke", second["id"], "--json").stdout) == {"id": second["id"], "revoked": True}
    assert json.loads(plait("keys", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("create", "--role", "root"), 1, "ROLE_UNKNOWN"),
        (("create", "--role", "predict", "--tenant", "nobody"), 1, "RESOURCE_NOT_FOUND"),
        (("create", "--role", "predict", "--expires", "soon"), 2, "expected a number and a unit"),
        (("rotate", "key-0", "--overlap", "1y"), 2, "expected a number and a unit"),
        (("create",), 2, "--role"),
    ],
)
def test_what_makes_no_sense_is_told(plait: Plait, words: tuple[str, ...], status: int, told: str) -> None:
    result = plait("keys", *words)
    assert result.exit_code == status
    assert told in result.output
