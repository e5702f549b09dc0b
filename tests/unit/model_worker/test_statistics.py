"""Counters: what is counted where, and that they only grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model_worker.statistics import ModelStatistics, Statistics
from plait.api.inference.v2 import inference_pb2 as pb


def described(counters: ModelStatistics) -> pb.ModelStatistics:
    message = pb.ModelStatistics()
    counters.describe(message)
    return message


def test_requests_are_counted_by_request_and_forward_passes_by_rows() -> None:
    counters = ModelStatistics(clock=lambda: 12.345)
    for queue_s in (0.001, 0.003):
        counters.answered(3, 0.5, queue_s=queue_s, input_s=0.01, compute_s=0.25, output_s=0.02)
    counters.failed(0.75)
    counters.batch(6, 0.25)
    found = described(counters)
    assert (found.inference_count, found.execution_count, found.last_inference) == (6, 1, 12345)
    stats = {field.name: (duration.count, duration.ns) for field, duration in found.inference_stats.ListFields()}
    assert stats == {
        "success": (2, 1_000_000_000),
        "fail": (1, 750_000_000),
        "queue": (2, 4_000_000),
        "compute_input": (2, 20_000_000),
        "compute_infer": (2, 500_000_000),
        "compute_output": (2, 40_000_000),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    [batch] = found.batch_stats
    assert (batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns, batch.compute_input.count) == (6, 1, 250_000_000, 1)


@given(st.lists(st.integers(1, 100_000), max_size=200))
def test_there_are_few_sizes_and_every_pass_is_counted_under_one_that_holds_it(sizes: list[int]) -> None:
    counters = ModelStatistics()
    for rows in sizes:
        counters.batch(rows, 0.0)
    found = described(counters)
    assert sum(b.compute_infer.count for b in found.batch_stats) == found.execution_count == len(sizes)
    assert {b.batch_size for b in found.batch_stats} == {rows if rows <= 32 else 2 ** (rows - 1).bit_length() for rows in sizes}
    assert len(found.batch_stats) <= 32 + 12


def test_a_version_keeps_its_counters() -> None:
    statistics = Statistics()
    statistics.of("m", "1").batch(1, 0.0)
    assert statistics.of("m", "1").executions == 1
    assert statistics.of("m", "2").executions == 0
