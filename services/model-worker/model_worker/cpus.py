"""How many CPUs this process may really use: a container's limit is a quota that `os.cpu_count` does not see, and an operator that
spreads over more threads than the quota allows is throttled in the middle of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_SELF: Final = Path("/proc/self/cgroup")


def available_cpus(root: Path = _ROOT, cgroup_file: Path = _SELF) -> int:
    """Return how many threads can run at once, at least 1: the scheduler's affinity, or the tightest cgroup quota rounded down."""
    quotas = [quota for quota in _quotas(root, _text(cgroup_file)) if quota is not None]
    return bounded(affinity(), quotas)


def affinity() -> int:
    """Return how many CPUs the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bounded(cpus: int, quotas: list[float]) -> int:
    """Return the whole number of CPUs that fits both; a quota of 1.5 gives 1, since the second thread would be throttled half the time."""
    return max(1, min([cpus, *(int(quota) for quota in quotas)]))


def quota_v2(cpu_max: str) -> float | None:
    """Return the CPUs that cgroup v2's `cpu.max` ("<quota> <period>", microseconds, or "max <period>") grants; None where unlimited.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files.
    """
    words = cpu_max.split()
    if not words:
        return None
    return _ratio(words[0], words[1] if len(words) > 1 else "100000")


def quota_v1(quota_us: str, period_us: str) -> float | None:
    """Return the CPUs that `cpu.cfs_quota_us` (-1 where unlimited) and `cpu.cfs_period_us` of cgroup v1 grant; None where unlimited."""
    return _ratio(quota_us.strip(), period_us.strip())


def groups(cgroup_file: str) -> tuple[str | None, str | None]:
    """Return this process's path in the v2 hierarchy and in v1's cpu hierarchy, from the text of /proc/self/cgroup; None where absent."""
    v2 = v1 = None
    for line in cgroup_file.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            v2 = path
        elif "cpu" in controllers.split(","):
            v1 = path
    return v2, v1


def _quotas(root: Path, cgroup_file: str) -> Iterator[float | None]:
    v2, v1 = groups(cgroup_file)
    for folder in _folders(root, v2):
        yield quota_v2(_text(folder / "cpu.max"))
    for mount in ("cpu", "cpu,cpuacct"):
        for folder in _folders(root / mount, v1):
            yield quota_v1(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _folders(root: Path, path: str | None) -> Iterator[Path]:
    """A parent's limit holds too. In a container the path may be the host's and lead nowhere; then the mount's root is the own group."""
    inside = PurePosixPath((path or "/").lstrip("/"))
    if ".." not in inside.parts:
        yield from (root / part for part in (inside, *inside.parents))
    else:
        yield root


def _ratio(quota: str, period: str) -> float | None:
    try:
        granted, per = int(quota), int(period)
    except ValueError:  # "max", or nothing there
        return None
    return granted / per if granted > 0 and per > 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
