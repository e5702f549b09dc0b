"""What an earlier run left behind."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from plait.errors import FailedPrecondition
from plait.local.child import Child
from plait.local.predecessor import gone

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")


async def test_nothing_there_is_fine(tmp_path: Path) -> None:
    await gone(tmp_path / "pid", marker="x", timeout_s=0)
    (tmp_path / "pid").write_text("no number")
    await gone(tmp_path / "pid", marker="x", timeout_s=0)


@pytest.mark.parametrize("pid", [4194304000, os.getpid()])
async def test_the_file_of_a_dead_or_another_process_is_removed(tmp_path: Path, pid: int) -> None:
    (tmp_path / "pid").write_text(f"{pid}\n/data\n")
    await gone(tmp_path / "pid", marker="/no/such/thing/in/the/command/line", timeout_s=0)
    assert not (tmp_path / "pid").exists()


async def test_one_that_is_ending_is_waited_for_and_one_that_is_not_is_named(tmp_path: Path) -> None:
    child = Child.start([sys.executable, "-c", "import time; time.sleep(600)", "the-marker"], name="s", log=tmp_path / "log")
    command = Path(f"/proc/{child.pid}/cmdline")
    while b"the-marker" not in command.read_bytes():  # until it has become what it is to be
        await asyncio.sleep(0.01)
    (tmp_path / "pid").write_text(f"{child.pid}\n")
    with pytest.raises(FailedPrecondition, match=rf"process {child.pid} still uses") as failed:
        await gone(tmp_path / "pid", marker="the-marker", timeout_s=0.01)
    assert failed.value.reason == "LOCAL_IN_USE"
    waiting = asyncio.create_task(gone(tmp_path / "pid", marker="the-marker", timeout_s=20))
    await child.stop(grace_s=20)
    await waiting
    assert not (tmp_path / "pid").exists()
