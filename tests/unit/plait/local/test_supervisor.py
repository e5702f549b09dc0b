"""What ends unasked comes back, but not for ever."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from plait.errors import Unavailable
from plait.local.child import Child
from plait.local.readiness import start_failed
from plait.local.supervisor import Restarts, supervise


def test_pauses_grow_and_end() -> None:
    restarts = Restarts(limit=7)
    assert [restarts.after_end(float(t)) for t in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, None]


def test_old_ends_are_forgiven() -> None:
    restarts = Restarts(limit=1, within_s=60)
    assert restarts.after_end(0) == 0.2
    assert restarts.after_end(61) == 0.2
    assert restarts.after_end(62) is None


async def test_it_is_started_again_until_it_is_hopeless(tmp_path: Path) -> None:
    said: list[str] = []
    starts = 0

    def spawn() -> Child:
        return Child.start([sys.executable, "-c", "raise SystemExit('no disk')"], name="s", log=tmp_path / "log")

    async def start() -> Child:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise start_failed(child, "was not ready")
        return spawn()

    child = spawn()
    with pytest.raises(Unavailable, match=r"s ended with status 1, again and again; it said:\n(.|\n)*no disk"):
        await supervise(
            "s", child, start, lambda name, what: said.append(f"{name} {what.splitlines()[0]}"), Restarts(limit=3, first_pause_s=0.0)
        )
    assert starts == 3
    again = "s ended with status 1; starting it again in 0 s"
    assert said[0] == said[2] == said[4] == again
    assert said[1] == said[5] == "s is up again"
    assert said[3].startswith("s s was not ready")
