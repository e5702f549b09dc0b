"""What a container may use, from the files a kernel writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_worker import cpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", None), ("200000 100000\n", 2.0), ("150000 100000", 1.5), ("50000", 0.5), ("", None), ("x y", None), ("1 0", None)],
)
def test_cgroup_v2(text: str, expected: float | None) -> None:
    assert cpus.quota_v2(text) == expected


@pytest.mark.parametrize(("quota", "period", "expected"), [("-1\n", "100000\n", None), ("300000\n", "100000\n", 3.0), ("", "", None)])
def test_cgroup_v1(quota: str, period: str, expected: float | None) -> None:
    assert cpus.quota_v1(quota, period) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/pod/c\n", ("/pod/c", None)),
        ("3:cpuset:/a\n4:cpu,cpuacct:/docker/b\n", (None, "/docker/b")),
        ("1:cpu:/\n0::/x:y\n", ("/x:y", "/")),
        ("", (None, None)),
    ],
)
def test_where_the_process_is(text: str, expected: tuple[str | None, str | None]) -> None:
    assert cpus.groups(text) == expected


@pytest.mark.parametrize(("count", "quotas", "expected"), [(8, [], 8), (8, [2.9, 4.0], 2), (8, [0.25], 1), (2, [16.0], 2)])
def test_the_tightest_limit_holds_and_one_cpu_is_left(count: int, quotas: list[float], expected: int) -> None:
    assert cpus.bounded(count, quotas) == expected


def files(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "content",
    [
        {"self": "0::/pod/c\n", "pod/c/cpu.max": "max 100000", "pod/cpu.max": "100000 100000"},
        {"self": "0::/../other\n", "cpu.max": "100000 100000"},
        {"self": "0::/of/the/host\n", "cpu.max": "100000 100000"},
        {"self": "4:cpu,cpuacct:/d\n", "cpu,cpuacct/d/cpu.cfs_quota_us": "100000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"},
    ],
)
def test_one_cpu_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str]) -> None:
    monkeypatch.setattr(cpus, "affinity", lambda: 8)
    files(tmp_path, content)
    assert cpus.available_cpus(tmp_path, tmp_path / "self") == 1


def test_no_limit_leaves_what_the_scheduler_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "affinity", lambda: 8)
    assert cpus.available_cpus(tmp_path, tmp_path / "self") == 8


def test_here() -> None:
    assert 1 <= cpus.available_cpus() <= cpus.affinity()
