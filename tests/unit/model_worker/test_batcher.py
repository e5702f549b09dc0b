"""Callers and batches, with a model that waits at a gate: order, cancellation, halving, closing."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tests.fakes.registry_world import eventually

from model_worker.batcher import Answer, Batcher, Request
from model_worker.instances import Instances
from model_worker.instruments import Instruments
from model_worker.process_instance import State
from model_worker.ragged import Layout
from model_worker.schedule import Limits, Schedule
from plait.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, ResourceExhausted, Unavailable
from plait.registry.records import Batching, Signature, TensorSpec
from plait.telemetry.metrics import Metrics

POISON, WIDE, SHORT, NAN, LOST, MEMORY = -1.0, -2.0, -3.0, -4.0, -5.0, -6.0
LAYOUT = Layout.of(
    Signature(
        inputs=(TensorSpec(name="x", dtype="float64", shape=(-1,)),), outputs=(TensorSpec(name="y", dtype="float64", shape=(-1, -1)),)
    ),
    Batching(),
)


class GatedModel:
    """y = [[10 · x]]. Waits at its gate, notes the batches it saw; answers wrongly or fails where the first rows say so."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.batches: list[list[float]] = []
        self.losses = 0
        self.most_rows = 10**9
        self.state = State.READY

    platform = "gated"
    memory_bytes = 0

    def prepare_thread(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to give back."""

    def __call__(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        [x] = inputs
        self.batches.append(x.tolist())
        assert self.open.wait(30)
        if (x == POISON).any():
            raise ValueError("poison")
        if (x == NAN).any():
            return [np.where(x == NAN, np.nan, x)[:, None]]
        if (x == MEMORY).any() or len(x) > self.most_rows:
            raise ResourceExhausted("too large for the device", reason="OUT_OF_DEVICE_MEMORY")
        if (x == LOST).any() and self.losses:
            self.losses -= 1
            raise Unavailable("the process ended", reason="INSTANCE_LOST")
        if (x == SHORT).any():
            return [x[:-1, None]]
        return [np.repeat(x[:, None] * 10, 2 if x[0] == WIDE else 1, axis=1)]


class World:
    def __init__(self, batcher: Batcher, model: GatedModel, schedule: Schedule[Request], metrics: Metrics) -> None:
        self.batcher = batcher
        self.model = model
        self.schedule = schedule
        self.metrics = metrics
        self.clock_s = 0.0

    def ask(self, *x: float, deadline_s: float = math.inf) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.batcher.submit((np.array(x),), len(x), deadline_s))

    async def busy(self, *x: float) -> asyncio.Task[Answer]:
        """Occupy the runner with a batch that waits at the gate."""
        self.model.open.clear()
        task = self.ask(*x)
        await eventually(lambda: len(self.model.batches) == 1)
        return task


@asynccontextmanager
async def world(more: Mapping[str, Any] = MappingProxyType({}), **limits: Any) -> AsyncIterator[World]:
    schedule: Schedule[Request] = Schedule(Limits(**{"max_rows": 100, "max_queue_rows": 1000, "margin_s": 0.0, **limits}))
    model, metrics = GatedModel(), Metrics()
    instances = Instances("m/1", (model,) * schedule.limits.instances)
    batcher = Batcher("m/1", instances, LAYOUT, schedule, Instruments(metrics).of("m", "1"), clock=lambda: w.clock_s, **more)
    w = World(batcher, model, schedule, metrics)
    try:
        yield w
    finally:
        model.open.set()
        await batcher.close()
        await instances.stop()


def values(answer: Answer) -> list[float]:
    found: list[float] = answer.outputs[0][:, 0].tolist()
    return found


async def test_requests_that_arrive_together_run_together() -> None:
    async with world() as w:
        answers = await asyncio.gather(w.ask(1), w.ask(2, 3), w.ask(4))
        assert [values(a) for a in answers] == [[10], [20, 30], [40]]
        assert w.model.batches == [[1, 2, 3, 4]]
        assert [a.batch_rows for a in answers] == [4, 4, 4]
        assert "rows=0/1000" in repr(w.batcher)


async def test_what_arrives_meanwhile_runs_next_by_deadline() -> None:
    async with world(max_rows=2) as w:
        first = await w.busy(1)
        others = [w.ask(2, deadline_s=30), w.ask(3, deadline_s=20), w.ask(4, deadline_s=10), w.ask(5)]
        await eventually(lambda: w.schedule.queued_rows == 4)
        w.clock_s = 5.0
        w.model.open.set()
        assert values(await first) == [10]
        assert [values(a) for a in await asyncio.gather(*others)] == [[20], [30], [40], [50]]
        assert w.model.batches == [[1], [4, 3], [2, 5]]
        assert (await others[0]).queue_s == 5.0


async def test_a_caller_that_goes_away_while_queued_takes_its_rows_along() -> None:
    async with world() as w:
        first = await w.busy(1)
        gone, stays = w.ask(2, 2), w.ask(3)
        await eventually(lambda: w.schedule.queued_rows == 3)
        gone.cancel()
        await eventually(lambda: w.schedule.queued_rows == 1)
        w.model.open.set()
        assert [values(await t) for t in (first, stays)] == [[10], [30]]
        assert w.model.batches == [[1], [3]]


async def test_a_caller_that_goes_away_inside_a_batch_disturbs_nobody() -> None:
    async with world() as w:
        first = await w.busy(1)
        gone, stays = w.ask(2), w.ask(3)
        await eventually(lambda: w.schedule.queued_rows == 2)
        first.cancel()
        w.model.open.set()
        assert [values(await t) for t in (gone, stays)] == [[20], [30]]
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_batch_that_fails_runs_again_by_halves_until_the_culprit_is_alone() -> None:
    async with world() as w:
        first = await w.busy(0)
        tasks = [w.ask(x) for x in (1, 2, POISON, 4, 5)]
        await eventually(lambda: w.schedule.queued_rows == 5)
        w.model.open.set()
        await first
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        culprit = answers.pop(2)
        assert isinstance(culprit, Internal)
        assert (culprit.reason, "poison" in culprit.message) == ("MODEL_EXECUTION_FAILED", False)
        assert [values(a) for a in answers] == [[10], [20], [40], [50]]  # type: ignore[arg-type]
        assert w.model.batches == [[0], [1, 2, -1, 4, 5], [1, 2], [-1, 4, 5], [-1], [4, 5]]


async def test_a_culprit_that_has_gone_leaves_no_trace() -> None:
    async with world() as w:
        first = await w.busy(0)
        bad, good = w.ask(POISON), w.ask(1)
        await eventually(lambda: w.schedule.queued_rows == 2)
        w.model.open.set()
        await first
        bad.cancel()
        assert values(await good) == [10]
        assert values(await w.ask(2)) == [20]


async def test_an_answer_of_the_wrong_length_is_the_models_fault() -> None:
    async with world() as w:
        with pytest.raises(Internal) as wrong:
            await w.ask(SHORT, 1)
        assert wrong.value.reason == "MODEL_OUTPUT_WRONG"


async def test_a_long_request_runs_in_pieces_and_urgent_ones_go_between() -> None:
    async with world(max_rows=2) as w:
        first = await w.busy(0)
        long, urgent = w.ask(1, 2, 3, 4, 5, deadline_s=50), w.ask(9, deadline_s=100)
        await eventually(lambda: w.schedule.queued_rows == 6)
        between = w.ask(7, 7, deadline_s=10)
        await eventually(lambda: w.schedule.queued_rows == 8)
        w.model.open.set()
        assert [values(await t) for t in (first, long, urgent, between)] == [[0], [10, 20, 30, 40, 50], [90], [70, 70]]
        assert w.model.batches == [[0], [7, 7], [1, 2], [3, 4], [5, 9]]


async def test_pieces_that_do_not_fit_together_fail_that_request_alone() -> None:
    async with world(max_rows=2) as w:
        first = await w.busy(0)
        bad, good = w.ask(WIDE, 2, 3, deadline_s=10), w.ask(4)
        await eventually(lambda: w.schedule.queued_rows == 4)
        w.model.open.set()
        await first
        with pytest.raises(Internal) as wrong:
            await bad
        assert wrong.value.reason == "MODEL_OUTPUT_WRONG"
        assert values(await good) == [40]


async def test_what_expires_while_it_waits_is_dropped_and_counted() -> None:
    async with world() as w:
        first = await w.busy(1)
        late = w.ask(2, deadline_s=3)
        await eventually(lambda: w.schedule.queued_rows == 1)
        w.clock_s = 4.0
        w.model.open.set()
        await first
        with pytest.raises(DeadlineExceeded):
            await late
        assert w.model.batches == [[1]]
        assert w.metrics.registry.get_sample_value("plait_model_worker_dropped_total", {"model": "m", "version": "1"}) == 1


async def test_who_is_not_let_in_hears_it_at_once() -> None:
    async with world(max_rows=2, max_queue_rows=2) as w:
        first = await w.busy(1)
        held = w.ask(2, 3)
        await eventually(lambda: w.schedule.queued_rows == 2)
        with pytest.raises(ResourceExhausted):
            await w.ask(4)
        w.clock_s = 1.0
        with pytest.raises(DeadlineExceeded):
            await w.ask(4, deadline_s=0.5)
        w.model.open.set()
        assert values(await first) == [10]
        assert values(await held) == [20, 30]


async def test_close_finishes_what_is_held_and_takes_nothing_new() -> None:
    async with world() as w:
        held = [await w.busy(1), w.ask(2)]
        await eventually(lambda: w.schedule.queued_rows == 1)
        closing = asyncio.create_task(w.batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await w.ask(3)
        assert refused.value.reason == "MODEL_UNLOADING"
        assert not closing.done()
        w.model.open.set()
        await closing
        assert [values(await t) for t in held] == [[10], [20]]
        assert "closing" in repr(w.batcher)


async def test_close_does_not_wait_for_those_who_have_gone() -> None:
    async with world() as w:
        gone = w.ask(1)
        await asyncio.sleep(0)
        gone.cancel()
        await w.batcher.close()


async def test_what_is_computed_is_measured() -> None:
    async with world() as w:
        await asyncio.gather(w.ask(1), w.ask(2, 3))
        labels = {"model": "m", "version": "1"}
        sample = w.metrics.registry.get_sample_value
        assert sample("plait_model_worker_batch_rows_sum", labels) == 3
        assert sample("plait_model_worker_batch_rows_count", labels) == 1
        assert sample("plait_model_worker_queue_seconds_count", labels) == 2
        assert sample("plait_model_worker_compute_seconds_count", labels) == 1


async def test_several_instances_compute_side_by_side() -> None:
    async with world(instances=2, max_rows=1) as w:
        w.model.open.clear()
        asked = [w.ask(1), w.ask(2), w.ask(3)]
        await eventually(lambda: len(w.model.batches) == 2)
        assert sorted(w.model.batches) == [[1], [2]]
        assert w.schedule.queued_rows == 1
        w.model.open.set()
        assert [values(a) for a in await asyncio.gather(*asked)] == [[10], [20], [30]]


async def test_a_request_of_priority_goes_first_and_the_default_before_the_patient() -> None:
    async with world(max_rows=1) as w:
        first = await w.busy(0)
        asked = [asyncio.create_task(w.batcher.submit((np.array([x]),), 1, math.inf, p)) for x, p in ((3.0, 5), (2.0, 0), (1.0, 1))]
        await eventually(lambda: w.schedule.queued_rows == 3)
        w.model.open.set()
        await asyncio.gather(first, *asked)
        assert w.model.batches == [[0], [1], [2], [3]]


async def test_a_batch_holds_no_more_bytes_than_it_may() -> None:
    async with world(max_bytes=16) as w:
        first = await w.busy(0)
        asked = [w.ask(1), w.ask(2), w.ask(3), w.ask(4, 5, 6)]
        await eventually(lambda: w.schedule.queued_rows == 6)
        w.model.open.set()
        await asyncio.gather(first, *asked)
        assert w.model.batches == [[0], [1, 2], [3], [4, 5, 6]]


async def test_nan_hurts_its_own_caller_only_and_names_the_model() -> None:
    async with world(more={"finite": True}) as w:
        good, bad, other = await asyncio.gather(w.ask(1), w.ask(NAN), w.ask(2), return_exceptions=True)
        assert isinstance(good, Answer)
        assert isinstance(other, Answer)
        assert isinstance(bad, FailedPrecondition)
        assert "m/1" in bad.message
        wrong = (await asyncio.gather(w.ask(math.nan), return_exceptions=True))[0]
        assert isinstance(wrong, InvalidArgument)
        assert wrong.reason == "INPUT_NOT_FINITE"
        assert bad.reason == "MODEL_OUTPUT_NOT_FINITE"
    async with world() as w:
        assert np.isnan((await w.ask(NAN)).outputs[0]).all()


async def test_a_batch_too_large_for_the_device_is_halved() -> None:
    async with world() as w:
        small, large = await asyncio.gather(w.ask(1), w.ask(MEMORY), return_exceptions=True)
        assert isinstance(small, Answer)
        assert isinstance(large, ResourceExhausted)
        assert large.reason == "OUT_OF_DEVICE_MEMORY"


async def test_a_request_too_large_for_the_device_is_halved_once() -> None:
    async with world() as w:
        w.model.most_rows = 2
        answer = await w.ask(1, 2, 3)
        assert values(answer) == [10, 20, 30]
        assert w.model.batches == [[1, 2, 3], [1], [2, 3]]
        w.model.batches.clear()
        [large] = await asyncio.gather(w.ask(1, 2, 3, 4, 5, 6), return_exceptions=True)
        assert isinstance(large, ResourceExhausted)
        assert large.reason == "OUT_OF_DEVICE_MEMORY"
        assert w.model.batches == [[1, 2, 3, 4, 5, 6], [1, 2, 3]]
        assert values(await w.ask(7)) == [70]


async def test_each_piece_of_a_long_request_may_be_halved_once() -> None:
    async with world(max_rows=4) as w:
        w.model.most_rows = 2
        assert values(await w.ask(1, 2, 3, 4, 5, 6, 7, 8)) == [10, 20, 30, 40, 50, 60, 70, 80]
        assert [len(batch) for batch in w.model.batches] == [4, 2, 2, 4, 2, 2]


async def test_a_request_that_may_not_be_split_is_not_halved() -> None:
    async with world(splits=False) as w:
        w.model.most_rows = 2
        [large] = await asyncio.gather(w.ask(1, 2, 3), return_exceptions=True)
        assert isinstance(large, ResourceExhausted)
        assert w.model.batches == [[1, 2, 3]]


async def test_a_batch_whose_process_died_runs_once_more() -> None:
    async with world() as w:
        w.model.losses = 1
        assert [values(a) for a in await asyncio.gather(w.ask(LOST), w.ask(2))] == [[-50], [20]]
        assert w.model.batches == [[LOST, 2], [LOST, 2]]
        w.model.losses = 9
        lost, other = await asyncio.gather(w.ask(LOST), w.ask(2), return_exceptions=True)
        assert isinstance(lost, Unavailable)
        assert lost.reason == "INSTANCE_LOST"
        assert isinstance(other, Answer)


async def test_a_model_that_hangs_is_left_behind_and_others_are_served() -> None:
    async with world(more={"budget_s": 0.05}, max_rows=1) as w:
        w.model.open.clear()
        hung, waiting = w.ask(1), w.ask(2)
        with pytest.raises(DeadlineExceeded) as refused:
            await hung
        assert refused.value.reason == "MODEL_HUNG"
        assert "m/1" in refused.value.message
        w.model.open.set()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], Answer | DeadlineExceeded)
        assert values(await w.ask(3)) == [30]
        assert (w.metrics.registry.get_sample_value("plait_model_worker_instance_restarts_total", {"model": "m", "version": "1"}) or 0) >= 1


async def test_a_model_that_always_hangs_is_given_up_and_says_so() -> None:
    async with world(more={"budget_s": 0.02}, max_rows=1) as w:
        w.model.open.clear()
        for _ in range(7):
            with pytest.raises(DeadlineExceeded) as refused:
                await w.ask(1)
            assert refused.value.reason == "MODEL_HUNG"
        assert len(w.model.batches) == 5  # the first, and four replacements


async def test_time_in_the_model_is_attributed_whole_and_by_rows() -> None:
    async with world(max_rows=3) as w:
        first = await w.busy(0)
        asked = [w.ask(1), w.ask(2, 3), w.ask(*range(5)), w.ask(4)]
        await eventually(lambda: w.schedule.queued_rows == 9)
        w.model.open.set()
        answers = await asyncio.gather(first, *asked)
        labels = {"model": "m", "version": "1"}
        busy_s = w.metrics.registry.get_sample_value("plait_model_worker_busy_seconds_total", labels)
        await eventually(lambda: w.metrics.registry.get_sample_value("plait_model_worker_batch_rows_sum", labels) == 10)
        busy_s = w.metrics.registry.get_sample_value("plait_model_worker_busy_seconds_total", labels)
        assert sum(answer.compute_s for answer in answers) == pytest.approx(busy_s, rel=0.01)
        assert answers[2].compute_s == pytest.approx(2 * answers[1].compute_s) or w.model.batches[1] != [1, 2, 3]


async def test_batches_are_padded_to_a_bucket_and_answers_are_not() -> None:
    async with world(more={"sizes": (4, 8)}) as w:
        assert values(await w.ask(1, 2, 3)) == [10, 20, 30]
        assert values(await w.ask(*range(5))) == [0, 10, 20, 30, 40]
        assert [len(batch) for batch in w.model.batches] == [4, 8]


async def test_while_its_process_is_starting_requests_wait_and_an_idle_batcher_can_be_closed() -> None:
    async with world() as w:
        w.model.state = State.STARTING
        waiting = w.ask(1)
        await asyncio.wait((waiting,), timeout=0.1)
        assert not waiting.done()
        assert w.model.batches == []
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(w.batcher.close(), 10)


async def test_a_watched_deadline_is_answered_while_the_model_is_busy() -> None:
    async with world() as w:
        running = await w.busy(1.0)
        waiting = asyncio.create_task(w.batcher.submit((np.array([2.0]),), 1, w.clock_s + 0.01, watched=True))
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(waiting, 10)
        assert w.schedule.queued_rows == 0
        w.model.open.set()
        await running
        assert w.model.batches == [[1.0]]
