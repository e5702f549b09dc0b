"""Threads that load: their priority, and what they leave behind."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from model_worker import background


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="a niceness belongs to a thread on Linux only")
async def test_a_load_runs_at_lower_priority_and_what_it_starts_need_not() -> None:
    usual = niceness()
    found = await background.start("load", lambda: (niceness(), background.at_normal_priority(niceness)))
    assert found == (min(19, max(usual, background.NICENESS)), usual)
    assert niceness() == usual


async def test_errors_arrive() -> None:
    with pytest.raises(ZeroDivisionError):
        await background.start("load", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await background.start("load", lambda: background.at_normal_priority(lambda: 1 / 0))
    assert background.at_normal_priority(lambda: 1) == 1
