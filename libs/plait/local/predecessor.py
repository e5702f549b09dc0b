"""What an earlier run left: a server that is still ending, or the pid file of one that ended without removing it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from plait.errors import FailedPrecondition

_PAUSE_S: Final = 0.05
_PROC: Final = Path("/proc")


async def gone(pid_file: Path, *, marker: str, timeout_s: float) -> None:
    """Wait until the process of `pid_file` has ended, then remove the file; `marker` is text in its command line that tells it apart.

    Process ids are used again quickly in containers, so a number alone proves nothing. Without /proc the file is left to its server.
    Raises FailedPrecondition (LOCAL_IN_USE) when it runs on.
    """
    pid = _read(pid_file)
    if pid is None or not _PROC.is_dir():
        return
    try:
        async with asyncio.timeout(timeout_s):
            while _is_running(pid, marker):  # noqa: ASYNC110 - another process's end, which we are not told
                await asyncio.sleep(_PAUSE_S)
    except TimeoutError:
        message = f"process {pid} still uses {pid_file.parent}; end it (kill {pid}) or choose another folder"
        raise FailedPrecondition(message, reason="LOCAL_IN_USE") from None
    pid_file.unlink(missing_ok=True)


def _read(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text(encoding="ascii").split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def _is_running(pid: int, marker: str) -> bool:
    try:
        return marker.encode() in (_PROC / str(pid) / "cmdline").read_bytes()  # empty for a zombie
    except OSError:
        return False
