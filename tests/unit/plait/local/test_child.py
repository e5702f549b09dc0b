"""Processes we start: watched, ended in time, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.local import launcher
from plait.local.accounts import Account
from plait.local.child import Child

STUBBORN = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
PARENT = """
import sys, time
from pathlib import Path
from plait.local.child import Child
child = Child.start([sys.executable, "-c", {code!r}], name="c", log=Path({log!r}))
while not child.log_tail(): time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(600)
"""


def spawn(tmp_path: Path, code: str, **more: object) -> Child:
    return Child.start([sys.executable, "-c", code], name="it", log=tmp_path / "logs" / "it.log", **more)  # type: ignore[arg-type]


async def until_it_says(child: Child, text: str) -> None:
    async with asyncio.timeout(20):
        while text not in child.log_tail():
            await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_its_end_and_what_it_said_are_known(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "it.log").write_text("from an earlier run\n")
    child = spawn(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert await child.wait() == 3
    assert sorted(child.log_tail().splitlines()) == ["err", "out"]
    assert "earlier" in child.log.read_text()
    assert repr(child) == f"<Child it pid={child.pid} exit=3>"
    assert await child.stop(grace_s=0) == 3


async def test_only_the_end_of_a_long_log_is_told(tmp_path: Path) -> None:
    child = spawn(tmp_path, "for i in range(10000): print(i)")
    await child.wait()
    assert child.log_tail().splitlines() == [str(i) for i in range(9980, 10000)]


async def test_it_ends_when_asked(tmp_path: Path) -> None:
    child = spawn(tmp_path, SLEEPER)
    await until_it_says(child, "up")
    assert await child.stop(signal.SIGTERM, grace_s=20) == -signal.SIGTERM


async def test_one_that_will_not_end_is_killed(tmp_path: Path) -> None:
    child = spawn(tmp_path, STUBBORN)
    await until_it_says(child, "deaf")
    assert await child.stop(signal.SIGTERM, grace_s=0.05) == -signal.SIGKILL


async def test_a_cancelled_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    child = spawn(tmp_path, STUBBORN)
    await until_it_says(child, "deaf")
    stopping = asyncio.create_task(child.stop(signal.SIGTERM, grace_s=60))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert child.returncode == -signal.SIGKILL


async def test_without_descriptors_of_processes_it_is_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: (_ for _ in ()).throw(OSError("no such call")), raising=False)
    assert await spawn(tmp_path, "raise SystemExit(4)").wait() == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux tells children of their parent's death")
@pytest.mark.parametrize("code", [SLEEPER, STUBBORN])
def test_it_dies_with_a_killed_parent(tmp_path: Path, code: str) -> None:
    script = PARENT.format(code=code, log=str(tmp_path / "c.log"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    until = time.monotonic() + 10
    while not is_gone(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="see above")
def test_it_does_not_start_for_a_parent_that_is_gone() -> None:
    command = [sys.executable, "-I", "-S", launcher.__file__, "1", "9", "", "", "/bin/true"]
    assert subprocess.run(command, check=False, timeout=30).returncode == launcher.ORPHANED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_root_is_given_up_for_good(tmp_path: Path) -> None:
    nobody = Account(name="nobody", uid=65534, gid=65534)
    argv = ["/bin/sh", "-c", "id -u; id -g; id -G; cat /proc/self/status | grep -E '^(Uid|Groups)'"]
    child = Child.start(argv, name="id", log=tmp_path / "id.log", account=nobody)
    assert await child.wait() == 0, child.log_tail()
    said = child.log_tail().splitlines()
    assert said[:3] == ["65534", "65534", "65534"]
    assert said[3].split()[1:] == ["65534"] * 4
