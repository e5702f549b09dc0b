"""A bar on a terminal, and nothing where nobody looks."""

from __future__ import annotations

import io
import sys

import pytest

from plait.cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.transfer("pushing ranker", 1000) as done:
        done(400)
        done(600)
    shown = sys.stderr.getvalue()
    assert "pushing ranker" in shown
    assert "1.0/1.0 kB" in shown


def test_a_pipe_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.transfer("pushing ranker", 1000) as done:
        done(1000)
    assert sys.stderr.getvalue() == ""


def test_rows_are_counted_with_their_rate_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.rows("materializing stats", 1000, 400) as show:
        show(700, 1000)
        show(1000, 1000)
    shown = sys.stderr.getvalue()
    assert "materializing stats" in shown
    assert "1000/1000" in shown
    assert "left:" in shown


def test_a_pipe_sees_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.rows("materializing stats", 1000) as show:
        show(1000, 1000)
    assert sys.stderr.getvalue() == ""
