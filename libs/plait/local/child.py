"""A process we start, watch and end, and which ends when we do, however we end (on Linux; elsewhere only when we end in order)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from plait.local import launcher
from plait.local.accounts import Account

_POLL_S: Final = 0.05  # only where the kernel cannot tell us
_TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 8192


class Child:
    """One running process; its output goes to a log file. Start it on a thread that lives as long as it shall: Linux ties it to that."""

    def __init__(self, popen: subprocess.Popen[bytes], *, name: str, log: Path, log_start: int) -> None:
        self._popen = popen
        self._log_start = log_start
        self.name = name
        self.log = log

    @classmethod
    def start(
        cls,
        argv: Sequence[str | Path],
        *,
        name: str,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: Account | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> Child:
        """Start `argv` (its first entry a full path) as `account`, which needs root; `death_signal` is what it gets when we die.

        It leads a session of its own, so that Ctrl-C in a terminal reaches us alone and we end our children in order.
        """
        identity = ("", "") if account is None else (str(account.uid), str(account.gid))
        command = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), str(int(death_signal)), *identity, *map(str, argv)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            start = output.tell()
            popen = subprocess.Popen(  # noqa: S603 - our own list, no shell
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True
            )
        return cls(popen, name=name, log=log, log_start=start)

    def __repr__(self) -> str:
        state = "running" if self.running else f"exit={self._popen.returncode}"
        return f"<Child {self.name} pid={self.pid} {state}>"

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, -N for signal N, None while it runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Return the exit status once it has ended."""
        if hasattr(os, "pidfd_open"):
            await self._wait_by_descriptor()
        while self.running:  # noqa: ASYNC110 - nobody will set an event where the kernel has no descriptors
            await asyncio.sleep(_POLL_S)
        return self._popen.returncode

    async def stop(self, number: signal.Signals = signal.SIGTERM, *, grace_s: float) -> int:
        """Ask it to end with signal `number`, kill it after `grace_s`; return the exit status. Fine to call again."""
        try:
            self._signal(number)
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            return await self.wait()
        finally:
            self._reap()

    def log_tail(self) -> str:
        """Return the last lines this process wrote (at most 20 lines, 8 KiB)."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_TAIL_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            self._popen.send_signal(number)

    def _reap(self) -> None:
        """Leave no process behind, not even when we are cancelled while we wait for it."""
        if self.running:
            self._popen.kill()
            self._popen.wait()

    async def _wait_by_descriptor(self) -> None:
        if not self.running:
            return
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:  # an old kernel, or a sandbox: polling will do
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
