"""The figures of changed routes are of what they say."""

from __future__ import annotations

import pytest

from plait_bench.router_changes import ROUTERS, Scale, main


def test_every_answer_is_of_one_world_and_the_figures_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait_bench.router_changes.QUICK", Scale(changes=2, calls=5, rounds=1))
    main(["--quick"])
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (lines["routers"], lines["changes"], lines["answers_of_two_worlds"]) == (str(ROUTERS), "2", "0")
    assert int(lines["answers"].replace(",", "")) >= 2 * ROUTERS
    assert all(float(lines[f"question_{name}_us"].replace(",", "")) > 0 for name in ("plain", "ten_rules", "experiment"))
