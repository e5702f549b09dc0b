"""The whole benchmark with tiny counts over a real router, a real proxy and a real stream, and the shape of its report."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest
from rich.console import Console

from plait.errors import InvalidArgument
from plait_bench import router, router_report
from plait_bench.measure import Plan
from plait_bench.router_pass_through import DIRECT, PROXY, ROUTER

TINY = Plan(rounds=2, seconds=0.15, warm_up_s=0.02, trial_s=0.15)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return router.measure(Console(file=io.StringIO()), tmp_path_factory.mktemp("state"), TINY)


def test_every_call_is_answered_and_figures_can_be_read_back(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts["pass_through"]) == {"200 bytes", "100 × 80 float32"}
    for found in facts["pass_through"].values():
        assert set(found["busy"]) == set(found["per_core"]) == {ROUTER, PROXY}
        assert set(found["lone"]) == {ROUTER, PROXY, DIRECT}
        for one in (*found["busy"].values(), *found["lone"].values()):
            assert one["calls"] > 0
            assert one["other_statuses"] == {}
        assert found["per_core_to_proxy"] == found["per_core"][ROUTER] / found["per_core"][PROXY]
        assert found["added_p50_ms"][ROUTER] == found["lone"][ROUTER]["p50_ms"] - found["lone"][DIRECT]["p50_ms"]
    overload = facts["overload"]
    assert list(overload["loads"]) == ["0.7", "1", "2", "4"]
    for one in overload["loads"].values():
        assert one["statuses"].keys() <= {"0", "4", "8"}, "answered, late, or refused"
    assert facts["faults"]["one_killed"]["failed"] == 0
    assert facts["cache"]["stampede_model_calls"] == 1
    assert facts["changes"]["answers_of_two_worlds"] == 0
    assert facts["machine"]["server_core"] in os.sched_getaffinity(0), "the run gives its cores back"


def test_a_person_can_read_it(facts: dict[str, Any]) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    for table in router_report.tables(facts):
        console.print(table)
    for line in router_report.remarks(facts):
        console.print(line)
    for word in (
        ROUTER,
        PROXY,
        DIRECT,
        "of the proxy's",
        "in time ÷ capacity",
        "calls failed",
        "ten times slower",
        "the cache",
        "of two worlds",
        "load average",
    ):
        assert word in text.getvalue()


def test_what_it_cannot_be_asked_for() -> None:
    with pytest.raises(InvalidArgument, match="peers"):
        router.run(Console(file=io.StringIO()), peers="all")
    with pytest.raises(InvalidArgument, match="device"):
        router.run(Console(file=io.StringIO()), device="cuda")
