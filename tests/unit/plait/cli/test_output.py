"""What is printed, for programs and for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from plait.cli import output

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def test_json_is_one_readable_document(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json({"name": "Amélie", "at": MOMENT, "none": None})
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": "Amélie", "at": "2026-01-02T03:04:05.000678+00:00", "none": None}
    assert "Amélie" in text
    with pytest.raises(TypeError, match="set is not JSON"):
        output.write_json({"names": {1}})


def test_tables_keep_what_goes_into_a_pipe_whole(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_table(("name", "what"), [("a", "x" * 300), ("[b]", None), (1, 2.5)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["NAME", "WHAT"], ["a", "x" * 300], ["[b]"], ["1", "2.5"]]


def test_results_and_notes_go_different_ways(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_line("a result [bold]", "green")
    output.write_note("a note [bold] " + "x" * 300)
    assert capsys.readouterr() == ("a result [bold]\n", "a note [bold] " + "x" * 300 + "\n")


def test_times_are_to_the_second() -> None:
    assert output.when(MOMENT) == "2026-01-02 03:04:05"
    assert output.when(None) == ""
