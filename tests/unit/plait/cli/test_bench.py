"""`plait bench`: which benchmark is run, and with what."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from plait.cli import extensions

Plait = Callable[..., Result]


class Recorder(EntryPoint):
    """An entry point whose benchmark prints what it was given."""

    def load(self) -> Any:
        return lambda console, *arguments: console.print(repr(arguments))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints([Recorder("rank", "nothing:nothing", extensions.BENCHES)])
    monkeypatch.setattr(extensions, "entry_points", found.select)


def test_it_runs_the_one_named(plait: Plait) -> None:
    result = plait("bench", "rank", "--json", "out.json", "--state", "here", "--quick")
    assert (result.exit_code, result.stdout) == (0, repr((Path("out.json"), Path("here"), True)) + "\n")
    assert plait("bench", "rank").stdout == repr((None, None, False)) + "\n"


def test_a_wrong_name_gets_the_right_ones(plait: Plait) -> None:
    result = plait("bench", "infer")
    assert result.exit_code == 1
    assert "there is no 'infer' among the benches; there is: rank" in result.stderr
    assert plait("bench").exit_code == 2
