"""Become another program that dies with the one that started it: give up root, ask the kernel for a signal on the parent's death, exec.

Run as a script (`python -I -S launcher.py …`) instead of Popen's preexec_fn, which is unsafe once the parent has threads, as every
process that speaks gRPC has. The kernel forgets the death signal when the user changes, hence the order. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
ORPHANED: Final = 125  # exit status when the parent was gone before we could watch it


def main(argv: list[str]) -> None:
    """Replace this process: argv is [parent's pid, death signal, uid or "", gid or "", program, arguments…]."""
    parent, death_signal, uid, gid = argv[:4]
    if uid and gid:
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    _die_with(int(parent), int(death_signal))
    os.execv(argv[4], argv[4:])  # noqa: S606 - the caller's own list, no shell


def _die_with(parent: int, death_signal: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:  # it died before the call: no signal will ever come
        sys.exit(ORPHANED)


if __name__ == "__main__":
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)  # Python ignores these, and exec would hand that on
    main(sys.argv[1:])
