"""The self-test of a served version: passed, failed, and ended by whatever its queue or the model does."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model_worker import retest
from model_worker.artifacts import Sample
from plait.errors import DeadlineExceeded, PlaitError
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec

USER = TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request")
ITEM = TensorSpec(name="item", dtype="float32", shape=(-1, 2))
SCORE = TensorSpec(name="score", dtype="float32", shape=(-1,))
RIGHT = np.array([1, 2, 3], np.float32)


class Queue:
    """Takes one request, notes it, and answers or fails."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.rows = 0
        self.left_s = 0.0

    async def submit(self, inputs: Any, rows: int, deadline_s: float) -> Any:
        self.rows, self.left_s = rows, deadline_s - time.monotonic()
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(outputs=(self.answer,))


async def tried(
    queue: Queue, *, inputs: tuple[TensorSpec, ...] = (USER, ITEM), outputs: Any = RIGHT, timeout_s: float = 30.0
) -> PlaitError | None:
    manifest = ArtifactManifest(name="m", format="torchscript", entry="m", inputs=inputs, outputs=(SCORE,))
    arrays = tuple(np.ones((3 if spec.per == "row" else 1, 2), np.float32) for spec in inputs)
    sample = Sample(inputs=arrays, outputs=None if outputs is None else (outputs,), tolerance=1e-3)
    return await retest.run(SimpleNamespace(manifest=manifest, batcher=queue), sample, timeout_s)  # type: ignore[arg-type]


async def test_the_right_answer_passes_and_goes_the_way_of_a_request() -> None:
    queue = Queue(RIGHT + np.float32(1e-5))
    assert await tried(queue) is None
    assert queue.rows == 3
    assert 0 < queue.left_s <= 30


async def test_a_model_without_rows_counts_as_one() -> None:
    queue = Queue(RIGHT)
    assert await tried(queue, inputs=(USER,)) is None
    assert queue.rows == 1


@pytest.mark.parametrize(
    ("answer", "outputs", "reason"),
    [
        (RIGHT + 1, RIGHT, "SELF_TEST_FAILED"),
        (RIGHT[:2], RIGHT, "SELF_TEST_FAILED"),
        (np.full(3, np.nan, np.float32), RIGHT, "SELF_TEST_FAILED"),
        (RIGHT.astype(np.float64), RIGHT, "MODEL_OUTPUT_WRONG"),
        (RIGHT.reshape(3, 1), None, "MODEL_OUTPUT_WRONG"),
        (DeadlineExceeded("too late", reason="DEADLINE_CANNOT_BE_MET"), RIGHT, "DEADLINE_CANNOT_BE_MET"),
        (ValueError("user 42"), RIGHT, "SELF_TEST_FAILED"),
    ],
)
async def test_anything_else_says_why(answer: Any, outputs: Any, reason: str) -> None:
    error = await tried(Queue(answer), outputs=outputs)
    assert error is not None
    assert error.reason == reason
    assert "42" not in error.message  # a model's own words may hold what it was given


async def test_a_pass_that_never_comes_back_has_failed() -> None:
    class Silent(Queue):
        async def submit(self, inputs: Any, rows: int, deadline_s: float) -> Any:
            await asyncio.Event().wait()

    error = await tried(Silent(None), timeout_s=0.01)
    assert error is not None
    assert error.reason == "SELF_TEST_FAILED"


async def test_where_no_answer_is_published_the_shape_will_do() -> None:
    assert await tried(Queue(RIGHT + 1), outputs=None) is None


async def test_without_a_sample_nothing_is_asked() -> None:
    queue = Queue(ValueError())
    assert await retest.run(SimpleNamespace(batcher=queue), None, 30.0) is None  # type: ignore[arg-type]
    assert queue.rows == 0
