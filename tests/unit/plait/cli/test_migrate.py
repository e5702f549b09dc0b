"""`plait migrate` on a real PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Callable

from typer.testing import Result

Plait = Callable[..., Result]


def test_the_first_run_applies_and_the_second_has_nothing_to_do(plait: Plait, postgres_dsn: str) -> None:
    first = plait("migrate", "--dsn", postgres_dsn)
    assert first.exit_code == 0
    assert all(line.startswith("applied ") for line in first.stdout.splitlines())
    again = plait("migrate", env={"PLAIT_POSTGRES_DSN": postgres_dsn})
    assert (again.exit_code, again.stdout) == (0, "up to date, nothing to do\n")


def test_json_names_what_was_applied(plait: Plait, postgres_dsn: str) -> None:
    assert json.loads(plait("migrate", "--dsn", postgres_dsn, "--json").stdout)["applied"]
    assert json.loads(plait("migrate", "--dsn", postgres_dsn, "--json").stdout) == {"applied": []}


def test_a_dsn_that_leads_nowhere_is_told_without_its_password(plait: Plait) -> None:
    for dsn in ("postgresql://plait:hush@127.0.0.1:1/plait", "nonsense://plait:hush@x"):
        result = plait("migrate", "--dsn", dsn)
        assert result.exit_code == 1
        assert "[REGISTRY_" in result.stderr
        assert "hush" not in result.stderr


def test_without_a_registry_it_says_what_to_do(plait: Plait) -> None:
    result = plait("migrate")
    assert result.exit_code == 1
    assert "[REGISTRY_UNKNOWN]" in result.stderr
