"""How much memory this process may use before the kernel kills it, and how much of that is left: cgroup v2, cgroup v1, or the machine's.

What counts is what lies nearest: a container usually has a limit far below the machine's memory, and any group above it may have a lower one.
Pages of files that the kernel can drop (`inactive_file`) are not counted as used, as the kubelet does it (its "working set").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NO_LIMIT: Final = 1 << 60  # v1 writes the largest multiple of a page where v2 writes "max"
_V2: Final = ("memory.max", "memory.current", "inactive_file")
_V1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Bytes this process may use, and bytes still to be had."""

    limit_bytes: int
    free_bytes: int


def read(root: Path = Path("/")) -> Reading | None:
    """Return what holds for this process now; None on a system without /proc. `root`: where the system's files are."""
    machine = _table(_text(root / "proc/meminfo"))
    if "MemTotal" not in machine:
        return None
    found = [Reading(limit_bytes=machine["MemTotal"], free_bytes=machine.get("MemAvailable", machine["MemTotal"]))]
    groups = _text(root / "proc/self/cgroup").splitlines()
    for folder, names in (*_v2_folders(root, groups), *_v1_folders(root, groups)):
        reading = _reading(folder, names)
        if reading is not None:
            found.append(reading)
    return Reading(limit_bytes=min(r.limit_bytes for r in found), free_bytes=max(0, min(r.free_bytes for r in found)))


def resident_bytes(root: Path = Path("/")) -> int:
    """Return this process's resident memory; 0 where the system does not say."""
    return _table(_text(root / "proc/self/status")).get("VmRSS", 0)


def _v2_folders(root: Path, groups: Iterable[str]) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    for line in groups:
        if line.startswith("0::"):
            for folder in _upwards(root / "sys/fs/cgroup", line[3:]):
                yield folder, _V2


def _v1_folders(root: Path, groups: Iterable[str]) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    for line in groups:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/memory", path):
                yield folder, _V1


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield a group's folder and those above it. Without a namespace of its own a container sees the host's path, which is not mounted in
    it: what is mounted then is its own group."""
    folder = mount.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
    while True:
        yield folder
        if folder == mount:
            return
        folder = folder.parent


def _reading(folder: Path, names: tuple[str, str, str]) -> Reading | None:
    limit_name, usage_name, droppable = names
    limit = _text(folder / limit_name).strip()
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    usage = _text(folder / usage_name).strip()
    used = int(usage) - _table(_text(folder / "memory.stat")).get(droppable, 0) if usage.isdigit() else 0
    return Reading(limit_bytes=int(limit), free_bytes=int(limit) - used)


def _table(text: str) -> Mapping[str, int]:
    """Parse "name value" or "name: value kB" lines; other lines are passed over."""
    table: dict[str, int] = {}
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) in (2, 3) and words[1].isdigit():
            table[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return table


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
