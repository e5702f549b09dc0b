"""Budgets on a clock of our own."""

from __future__ import annotations

import math
import time

import pytest

from plait.rpc.deadline import Deadline


def test_what_is_left_shrinks_and_goes_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline = Deadline.after(2.0)
    assert deadline.remaining_s() == 2.0
    now = 103.0
    assert deadline.remaining_s() == -1.0
    assert deadline.expired


def test_never_and_at_most() -> None:
    assert Deadline.never().remaining_s() == math.inf
    assert not Deadline.never().expired
    assert Deadline.never().at_most(5).remaining_s() <= 5
    early = Deadline.after(1)
    assert early.at_most(100) == early
