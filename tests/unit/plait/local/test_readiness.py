"""Waiting for a server: it answers, dies, or never comes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from plait.errors import Unavailable
from plait.local.child import Child
from plait.local.readiness import until_ready


def spawn(tmp_path: Path, code: str) -> Child:
    return Child.start([sys.executable, "-c", code], name="server", log=tmp_path / "server.log")


async def no() -> bool:
    return False


async def test_it_returns_once_the_probe_agrees(tmp_path: Path) -> None:
    answers = iter([False, False, True])

    async def probe() -> bool:
        return next(answers)

    child = spawn(tmp_path, "import time; time.sleep(600)")
    await until_ready(child, probe, timeout_s=20)
    assert child.running
    await child.stop(grace_s=20)


async def test_a_death_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    child = spawn(tmp_path, "raise SystemExit('the disk is full')")
    with pytest.raises(
        Unavailable, match=r"server ended with status 1 before it was ready; it said:\nthe disk is full\n\(log: .*server.log\)"
    ):
        await until_ready(child, no, timeout_s=20)


async def test_what_never_answers_is_ended(tmp_path: Path) -> None:
    child = spawn(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(Unavailable, match=r"not ready within 0.05 s and said nothing"):
        await until_ready(child, no, timeout_s=0.05)
    assert not child.running


async def test_a_probe_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    async def broken() -> bool:
        raise ZeroDivisionError

    child = spawn(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(ZeroDivisionError):
        await until_ready(child, broken, timeout_s=20)
    assert not child.running
