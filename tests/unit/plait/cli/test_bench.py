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
    """An entry point whose benchmark prints what it was given; "worker" knows peers and devices."""

    def load(self) -> Any:
        if self.name == "worker":
            return lambda console, *arguments, peers="none", device="cpu": console.print(repr((*arguments, peers, device)))
        return lambda console, *arguments: console.print(repr(arguments))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints([Recorder(name, "nothing:nothing", extensions.BENCHES) for name in ("rank", "worker")])
    monkeypatch.setattr(extensions, "entry_points", found.select)


def test_it_runs_the_one_named(plait: Plait) -> None:
    result = plait("bench", "rank", "--json", "out.json", "--state", "here", "--quick")
    assert (result.exit_code, result.stdout) == (0, repr((Path("out.json"), Path("here"), True)) + "\n")
    assert plait("bench", "rank").stdout == repr((None, None, False)) + "\n"


def test_a_wrong_name_gets_the_right_ones(plait: Plait) -> None:
    result = plait("bench", "infer")
    assert result.exit_code == 1
    assert "there is no 'infer' among the benches; there is: rank, worker" in result.stderr
    assert plait("bench").exit_code == 2


def test_peers_go_to_a_benchmark_that_knows_them(plait: Plait) -> None:
    assert plait("bench", "worker", "--peers", "mosec,kserve").stdout == repr((None, None, False, "mosec,kserve", "cpu")) + "\n"
    assert plait("bench", "worker").stdout == repr((None, None, False, "none", "cpu")) + "\n"
    result = plait("bench", "rank", "--peers", "mosec")
    assert result.exit_code == 1
    assert "the benchmark 'rank' knows no peers: leave --peers out" in result.stderr


def test_a_device_goes_to_a_benchmark_that_knows_them(plait: Plait) -> None:
    assert plait("bench", "worker", "--device", "cuda:1").stdout == repr((None, None, False, "none", "cuda:1")) + "\n"
    result = plait("bench", "rank", "--device", "cuda")
    assert result.exit_code == 1
    assert "the benchmark 'rank' knows no device: leave --device out" in result.stderr
