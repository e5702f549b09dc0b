"""`plait demo`: which demo is run, and with what."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from plait.cli import extensions
from plait.errors import Unavailable

Plait = Callable[..., Result]
CALLS: list[Any] = []


def demo(*arguments: Any) -> None:
    """What an example package would bring."""
    arguments[0].print("the show")
    CALLS.append(arguments[1:])


def broken(*_: Any) -> None:
    """A demo that fails."""
    raise Unavailable("the data cannot be fetched", reason="DATA_AWAY")


class InThisFile(EntryPoint):
    """An entry point that finds its function here, however this file was imported."""

    def load(self) -> Any:
        return {"demo": demo, "broken": broken}[self.value]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints([InThisFile("shop", "demo", extensions.DEMOS), InThisFile("bank", "broken", extensions.DEMOS)])
    monkeypatch.setattr(extensions, "entry_points", found.select)
    CALLS.clear()


def test_it_runs_the_one_named(plait: Plait) -> None:
    result = plait("demo", "shop", "--json", "facts.json", "--state", "here")
    assert (result.exit_code, result.stdout) == (0, "the show\n")
    assert [(Path("facts.json"), Path("here"))] == CALLS
    plait("demo", "shop")
    assert CALLS[1] == (None, None)


def test_a_choice_must_be_made(plait: Plait) -> None:
    result = plait("demo")
    assert result.exit_code == 1
    assert "name one of: bank, shop  [EXTENSION_NOT_FOUND]" in result.stderr


def test_its_failure_is_told_like_any(plait: Plait) -> None:
    result = plait("demo", "bank")
    assert (result.exit_code, result.stderr) == (1, "error: the data cannot be fetched  [DATA_AWAY]\n")


def test_wrong_paths_are_refused_before_anything_runs(plait: Plait) -> None:
    Path("file").touch()
    assert plait("demo", "shop", "--state", "file").exit_code == 2
    assert plait("demo", "shop", "--json", ".").exit_code == 2
    assert CALLS == []
