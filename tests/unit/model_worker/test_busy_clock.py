"""A thread that sleeps is not busy; one that works is."""

from __future__ import annotations

import threading
import time

import pytest

from model_worker import busy_clock


def test_sleeping_does_not_count_and_working_does() -> None:
    clock = busy_clock.busy_clock()
    slept, _ = clock(), threading.Event().wait(0.05)
    assert clock() - slept < 0.04  # a fresh thread waits for a CPU while it wakes, but not for most of the time
    began, worked_s = clock(), time.thread_time()
    while time.thread_time() - worked_s < 0.02:
        pass
    assert clock() - began >= 0.02


def test_without_schedstat_the_time_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_clock, "_SCHEDSTAT", "/proc/there/is/none")
    assert busy_clock.busy_clock() is time.thread_time
