"""Trailers hold whole microseconds; those of a stream are sums."""

from __future__ import annotations

from model_worker import costs
from model_worker.batcher import Answer
from model_worker.costs import StreamCosts

ANSWER = Answer(outputs=(), queue_s=0.0015, compute_s=0.25, batch_rows=9)


def test_an_answer_says_what_it_cost_and_who_gave_it() -> None:
    assert dict(costs.trailers(ANSWER, "3")) == {
        "plait-model-version": "3",
        "plait-queue-us": "1500",
        "plait-compute-us": "250000",
        "plait-batch-rows": "9",
    }


def test_a_stream_says_what_it_cost_altogether() -> None:
    spent = StreamCosts()
    assert set(dict(spent.trailers()).values()) == {"0"}
    spent.add(ANSWER)
    spent.add(ANSWER)
    spent.failed += 1
    assert dict(spent.trailers()) == {
        "plait-answered": "2",
        "plait-failed": "1",
        "plait-queue-us": "3000",
        "plait-compute-us": "500000",
    }
