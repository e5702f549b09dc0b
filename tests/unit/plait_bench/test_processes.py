"""Servers under test: where they run, what they cost with their children, and that nothing of them is left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from plait.errors import Unavailable
from plait_bench.processes import ServerProcess, cores, cpu_seconds, free_port, wait_for_port

CORE = min(os.sched_getaffinity(0))
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.2: pass\\nprint('spun', flush=True)\\ntime.sleep(600)"])
print(child.pid, os.sched_getaffinity(0), flush=True)
time.sleep(600)
"""


def start(code: str, log: Path) -> ServerProcess:
    return ServerProcess("thing", [sys.executable, "-c", code], core=CORE, log=log, env=os.environ)


def until(log: Path, text: str) -> str:
    give_up_s = time.monotonic() + 30
    while text not in (said := log.read_text()):
        assert time.monotonic() < give_up_s, said
        time.sleep(0.01)
    return said


def test_children_are_pinned_billed_and_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with start(FAMILY, log) as server:
        said = until(log, "spun")
        assert f"{{{CORE}}}" in said
        child = int(said.split()[0])
        assert server.cpu_s() >= 0.2 - 0.02  # the kernel counts in ticks of 10 ms
        assert sum(cpu_seconds([server.pid])) < server.cpu_s()
        assert Path(f"/proc/{child}").exists()
        server.check()
    give_up_s = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_one_that_ends_shows_what_it_said(tmp_path: Path) -> None:
    with start("print('no such model'); raise SystemExit(3)", tmp_path / "log") as server:
        with pytest.raises(Unavailable, match="ended with status 3") as caught:
            wait_for_port(server, free_port(), 30)
        assert caught.value.reason == "BENCH_SERVER_FAILED"
        assert "no such model" in caught.value.message


def test_one_that_never_listens_is_given_up(tmp_path: Path) -> None:
    with start("import time; time.sleep(600)", tmp_path / "log") as server, pytest.raises(Unavailable, match="did not listen within"):
        wait_for_port(server, free_port(), 0.1)


def test_one_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = start("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)", log)
    until(log, "up")
    server.stop(grace_s=0.05)
    with pytest.raises(Unavailable, match="status -9"):
        server.check()


def test_server_and_load_get_different_cores_where_there_are_two() -> None:
    server, load = cores()
    assert {server, load} <= os.sched_getaffinity(0)
    assert (server != load) == (len(os.sched_getaffinity(0)) > 1)
