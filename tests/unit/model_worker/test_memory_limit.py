"""Limits out of sample files of each kind of system."""

from __future__ import annotations

from pathlib import Path

from model_worker.memory_limit import Reading, read, resident_bytes

MEMINFO = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machine(tmp_path: Path) -> None:
    assert read(system(tmp_path, {})) == Reading(limit_bytes=1_024_000, free_bytes=921_600)
    assert read(tmp_path / "nothing") is None
    assert (resident_bytes() > 0, resident_bytes(tmp_path)) == (True, 0)


def test_cgroup_v2_takes_the_lowest_limit_on_the_way_up(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/app\n"}
    for folder, limit, used in (("pod", "5000", "4000"), ("pod/app", "max", "9")):
        files |= {f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}/memory.current": f"{used}\n"}
    files["sys/fs/cgroup/pod/memory.stat"] = "anon 1\ninactive_file 1500\n"
    assert read(system(tmp_path, files)) == Reading(limit_bytes=5000, free_bytes=2500)


def test_cgroup_v1_falls_back_to_what_is_mounted(tmp_path: Path) -> None:
    v1 = "sys/fs/cgroup/memory/memory."
    files = {"proc/self/cgroup": "4:memory:/docker/abc\n", f"{v1}limit_in_bytes": "7000\n", f"{v1}usage_in_bytes": "8000\n"}
    assert read(system(tmp_path, files)) == Reading(limit_bytes=7000, free_bytes=0)
    (tmp_path / f"{v1}limit_in_bytes").write_text("9223372036854771712\n")
    assert read(tmp_path) == Reading(limit_bytes=1_024_000, free_bytes=921_600)
