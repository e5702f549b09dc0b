"""How long a thread had something to do: the time it ran, and the time it wanted to and another process had its CPU.

The difference to the wall clock is the time it slept, also on a machine whose CPUs are shared or throttled, where CPU time alone would
make a thread that is kept from running look idle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

# "<ns on a CPU> <ns waiting for one> <times>"; the first is as old as the last tick, so only the second is taken from here.
# https://docs.kernel.org/scheduler/sched-stats.html
_SCHEDSTAT: Final = "/proc/thread-self/schedstat"
_MAX_BYTES: Final = 64


def busy_clock() -> Callable[[], float]:
    """Return a clock of the calling thread, to be called in it: seconds run or waited for a CPU. Without Linux' schedstat, seconds run."""
    try:
        file = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return time.thread_time
    descriptor = _Descriptor(file)
    return lambda: time.thread_time() + int(os.pread(descriptor.file, _MAX_BYTES, 0).split()[1]) / 1e9


class _Descriptor:
    """Closes it with the clock."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self) -> None:
        os.close(self.file)
