"""The whole benchmark with tiny counts over a real model-worker, and the shape of its report."""

from __future__ import annotations

import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plait.errors import InvalidArgument
from plait_bench import live_load, report, worker
from plait_bench.measure import QUICK, Plan
from plait_bench.models import HEAVY

TINY = Plan(rounds=2, seconds=0.15, warm_up_s=0.02, trial_s=0.15)
NUMBER = (int, float)
FIGURES = {
    "callers": int,
    "rows_per_call": int,
    "calls_per_s": NUMBER,
    "calls_per_s_rounds": [NUMBER],
    "rows_per_s": NUMBER,
    "p50_ms": NUMBER,
    "p99_ms": NUMBER,
    "server_cpu_ms_per_call": NUMBER,
    "load_cpu_us_per_call": NUMBER,
    "calls": int,
    "other_statuses": dict,
}
OVERLOAD = dict.fromkeys(("sustainable_per_s", "begun_per_s", "budget_ms", "answered_share", "answered_per_s", "answered_to_sustainable", "answered_p50_ms", "answered_p99_ms", "answered_late_per_s", "resource_exhausted", "deadline_exceeded", "never_answered"), NUMBER) | {"statuses": dict}  # fmt: skip
LOADS = ("1 caller", "16 callers, a connection each", "16 callers, one connection")


def check(found: Any, shape: Any, at: str = "report") -> None:
    """Fail where `found` is not of this shape: types, lists of one shape, mappings with exactly these keys."""
    if isinstance(shape, dict):
        assert set(found) == set(shape), at
        for key, inner in shape.items():
            check(found[key], inner, f"{at}.{key}")
    elif isinstance(shape, list):
        assert found, at
        for number, one in enumerate(found):
            check(one, shape[0], f"{at}[{number}]")
    else:
        assert isinstance(found, shape), at


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_load, "LARGE", HEAVY)
        return worker.measure(Console(file=io.StringIO()), tmp_path_factory.mktemp("state"), TINY, [])


def test_the_report_is_complete_and_can_be_read_back(facts: dict[str, Any]) -> None:
    own = dict.fromkeys(facts["model_infer"]["1 caller"], FIGURES)
    assert "plait torchscript" in own
    batching = {
        "model_alone_rows_per_s": NUMBER,
        "model_alone_cpu_ms_per_row": NUMBER,
        "dynamic_64_to_model_alone_by_cpu": NUMBER,
        "dynamic_64_to_model_alone": NUMBER,
        "dynamic_64_to_one_caller_of_64_rows": NUMBER,
        "figures": dict.fromkeys(("dynamic, 1 × 1 row", "dynamic, 16 × 1 row", "dynamic, 64 × 1 row", "1 × 64 rows"), FIGURES),
    }
    if "dynamic_64_to_static_64" in facts["batching"]["mlp"]:
        batching["dynamic_64_to_static_64"] = NUMBER
        batching["figures"]["static, 64 × 1 row"] = FIGURES  # type: ignore[index]
    lone = {"figures": {"batching on": FIGURES, "batching off": FIGURES}, "p50_on_to_off": NUMBER}
    beside = dict.fromkeys(("loads", "load_s", "p50_loading_to_quiet", "p99_loading_to_quiet", "rate_loading_to_quiet"), NUMBER)
    beside["figures"] = dict.fromkeys(("nothing loads", "a model loads"), FIGURES | {"p99_9_ms": NUMBER, "p100_ms": NUMBER})
    shape = {
        "schema": str,
        "machine": {
            "cpu": str,
            "cores": int,
            "server_core": int,
            "load_core": int,
            "python": str,
            "system": str,
            "versions": {"numpy": str, "grpcio": str, "torch": str, "torch_cpu": str},
            "load_average": {"before": [NUMBER], "after": [NUMBER]},
        },
        "plan": {"rounds": int, "seconds": NUMBER, "warm_up_s": NUMBER},
        "ceiling": {"http": FIGURES, "grpc": FIGURES},
        "model_infer": dict.fromkeys(LOADS, own),
        "batching": {"mlp": batching, "heavy": batching},
        "lone_caller": {"1 row": lone, "100 rows": lone},
        "overload": {"64 rows": OVERLOAD, "1 row": OVERLOAD},
        "load_while_serving": {
            "model_bytes": int,
            "callers": int,
            "rows_per_call": int,
            "formats": dict.fromkeys(facts["load_while_serving"]["formats"], beside),
        },
        "peers": {},
        "skipped": [{"what": str, "reason": str}],
        "took_s": NUMBER,
    }
    check(json.loads(json.dumps(facts)), shape)


def test_every_call_went_well_and_what_is_missing_is_said(facts: dict[str, Any]) -> None:
    for figures in (*facts["model_infer"].values(), *(b["figures"] for b in facts["batching"].values())):
        for one in figures.values():
            assert one["other_statuses"] == {}
            assert len(one["calls_per_s_rounds"]) == TINY.rounds
            assert one["calls"] > 0
    assert all(found["loads"] >= TINY.rounds for found in facts["load_while_serving"]["formats"].values())
    assert ("peers" in {skipped["what"] for skipped in facts["skipped"]}) is True
    assert sum(facts["overload"]["1 row"]["statuses"].values()) > 0


def test_the_load_is_not_left_on_its_core(facts: dict[str, Any]) -> None:
    assert facts["machine"]["cores"] == os.cpu_count()
    assert {facts["machine"]["server_core"], facts["machine"]["load_core"]} <= os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) == len(set(os.sched_getaffinity(os.getppid())))


def test_a_person_sees_every_figure(facts: dict[str, Any]) -> None:
    with_peer = copy.deepcopy(facts)
    one = facts["model_infer"]["1 caller"]["plait torchscript"]
    ratio = {"plait torchscript": {"calls_per_s": 1.25, "server_cpu_per_call": 0.5}}
    load = {"setting": "no batching", "figures": {"plait torchscript": one, "other": one}, "ours_to_peer": ratio}
    with_peer["peers"] = {"other": {"version": "1.2.3", "protocol": "smoke", "loads": {"1 caller": load}}}
    console = Console(file=io.StringIO(), width=120)
    for table in report.tables(with_peer):
        console.print(table)
    for line in report.remarks(with_peer):
        console.print(line)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for part in (
        "other 1.2.3 (smoke; no batching), 1 caller",
        "1.25 ×",
        "0.50 ×",
        "batching off",
        "for exactly 64",
        "overload, 1 row",
        "left out: peers",
        "load average",
    ):
        assert part in text, part
    assert f"{one['calls_per_s']:.0f}" in text


def test_run_prints_writes_and_minds_the_names_of_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]) -> None:
    asked: list[Any] = []

    def measured(_console: Console, state: Path | None, plan: Plan, peers: list[Any]) -> dict[str, Any]:
        asked.append((state, plan, [peer.name for peer in peers]))
        return copy.deepcopy(facts)

    monkeypatch.setattr(worker, "measure", measured)
    file = tmp_path / "reports" / "bench.json"
    found = worker.run(Console(file=io.StringIO()), file, tmp_path, True, "kserve")
    assert asked == [(tmp_path, QUICK, ["kserve"])]
    assert json.loads(file.read_text())["quick"] is found["quick"] is True
    with pytest.raises(InvalidArgument):
        worker.run(Console(file=io.StringIO()), peers="nobody")
