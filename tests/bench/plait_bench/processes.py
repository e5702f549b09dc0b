"""A server under test: started on its own core, watched until it answers, billed for its CPU time with all its children, ended whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from plait.errors import Unavailable

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_TAIL_BYTES: Final = 2000
# The core is chosen in the child before it becomes the server, so that every thread and process it will ever have stays there.
_PINNED: Final = "import os,sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def cores() -> tuple[int, int]:
    """Return the server's core and the load's; the same one where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


class ServerProcess:
    """A process group on one core; output goes to `log`."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], *, core: int, log: Path, env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.name = name
        self._log = log
        command = [sys.executable, "-I", "-S", "-c", _PINNED, str(core), *map(str, argv)]
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env), cwd=cwd, start_new_session=True
            )

    def __repr__(self) -> str:
        return f"<ServerProcess {self.name} pid={self._popen.pid} exit={self._popen.poll()}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self._popen.pid

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far by everything in its session."""
        return sum(cpu_seconds(_session(self._popen.pid)))

    def check(self) -> None:
        """Raise Unavailable (BENCH_SERVER_FAILED) with the end of its log if it has ended."""
        if self._popen.poll() is not None:
            raise self.failed(f"ended with status {self._popen.returncode}")

    def failed(self, what: str) -> Unavailable:
        """Return an error that shows the end of the log."""
        tail = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return Unavailable(f"{self.name} {what}; it said:\n{tail}\n(log: {self._log})", reason="BENCH_SERVER_FAILED")

    def stop(self, grace_s: float = 10.0) -> None:
        """End it and whatever it started."""
        pids = _session(self._popen.pid)
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        for pid in {*pids, *_session(self._popen.pid)} - {self._popen.pid}:
            if _session_of(pid) == self._popen.pid:
                _kill(pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the third on (the name before may hold anything)."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _session_of(pid: int) -> int:
    try:
        return int(_stat(pid)[3])
    except OSError:
        return -1


def _session(leader: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _session_of(pid) == leader]


def cpu_seconds(pids: Iterable[int]) -> Iterable[float]:
    """Yield user and system time of each process that still runs."""
    for pid in pids:
        try:
            fields = _stat(pid)
        except OSError:
            continue
        yield (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def wait_for_port(server: ServerProcess, port: int, timeout_s: float) -> None:
    """Return once somebody listens. Raises Unavailable (BENCH_SERVER_FAILED)."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        server.check()
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise server.failed(f"did not listen within {timeout_s:g} s")
