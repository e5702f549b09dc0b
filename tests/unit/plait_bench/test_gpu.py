"""The benchmark of a GPU: its two scenarios run on the CPU, where they show that they measure; the GPU itself where there is one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.fakes.gpu import needs_gpu

from plait.errors import FailedPrecondition, Internal, InvalidArgument
from plait_bench import gpu, worker
from plait_bench.gpu import Candidate
from plait_bench.measure import Plan
from plait_bench.models import MLP

TINY = Plan(rounds=2, seconds=0.15, warm_up_s=0.02, trial_s=0.15)
FIGURES = {"rows_per_call", "threads", "rows_per_s", "rows_per_s_rounds", "p50_ms", "p99_ms", "calls", "to_eager"}


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="there is no CUDA device here") as refused:
        worker.run(console(), tmp_path / "report.json", device="cuda")
    assert refused.value.reason == "DEVICE_UNAVAILABLE"
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps"])
def test_a_device_that_nobody_knows_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        worker.run(console(), device=device)
    assert refused.value.reason == "BENCH_DEVICE_UNKNOWN"


def test_peers_are_not_measured_on_a_gpu() -> None:
    with pytest.raises(InvalidArgument) as refused:
        worker.run(console(), peers="mosec", device="cuda")
    assert refused.value.reason == "BENCH_WITHOUT_PEERS"


def test_both_scenarios_measure_eager_and_ours_side_by_side(tmp_path: Path) -> None:
    facts: dict[str, Any] = gpu.measure(console(), tmp_path, TINY, "cpu", networks=(MLP,), rows=(1, 64))
    json.dumps(facts)
    loads = facts["model"]["mlp"]
    assert set(loads) == {f"{rows} rows, {threads}" for rows in (1, 64) for threads in ("1 thread", "4 threads")}
    for figures in loads.values():
        assert set(figures) == {"eager PyTorch", "plait"}
        for one in figures.values():
            assert set(one) == FIGURES
            assert one["calls"] > 0
            assert one["p50_ms"] <= one["p99_ms"]
        assert figures["eager PyTorch"]["to_eager"] == 1
    assert set(facts["served"]["mlp"]) == {f"{rows} rows, {callers} callers" for callers, rows in gpu.SERVED}
    assert len(list(gpu.tables(facts))) == 5


def test_other_scores_than_the_models_are_no_result() -> None:
    wrong = Candidate(name="wrong", prepare=lambda: None, call=lambda x: np.zeros(len(x), np.float32))
    with pytest.raises(Internal, match="wrong answers other scores"):
        gpu.in_turn([wrong], MLP, 4, 1, TINY, lambda *_: None)


def test_a_caller_that_fails_ends_the_measurement() -> None:
    def fail(_: Any) -> Any:
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        gpu.closed_loop(Candidate(name="fails", prepare=lambda: None, call=fail), MLP.rows(1), 4, TINY)


@needs_gpu
def test_on_a_gpu_graphs_and_half_precision_are_measured_too(tmp_path: Path) -> None:
    facts: dict[str, Any] = gpu.measure(console(), tmp_path, TINY, "cuda:0", networks=(MLP,), rows=(64,))
    names = {"eager PyTorch", "plait", "plait, graphs", "eager PyTorch, float16", "plait, graphs, float16"}
    assert all(set(figures) == names for figures in facts["model"]["mlp"].values())
