"""What was spent on a call, as the trailers of its answer say it.

The answers of a stream share one set of trailers, so each says its own cost in its message: the response parameters `queue_us`, `compute_us`
and `batch_rows`, and the field `model_version`, are the trailers of a lone answer in other clothes. What the stream cost altogether comes at
its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_worker.batcher import Answer

Trailers = tuple[tuple[str, str], ...]


def trailers(answer: Answer, version: str) -> Trailers:
    """Return what one answer cost: microseconds waited and computed (its share by rows), rows of its batch, and who computed it."""
    return (
        ("plait-model-version", version),
        ("plait-queue-us", _us(answer.queue_s)),
        ("plait-compute-us", _us(answer.compute_s)),
        ("plait-batch-rows", str(answer.batch_rows)),
    )


@dataclass(slots=True)
class StreamCosts:
    """What the requests of one stream cost so far, seconds."""

    answered: int = 0
    failed: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.answered += 1
        self.queue_s += answer.queue_s
        self.compute_s += answer.compute_s

    def trailers(self) -> Trailers:
        """Return the sums. A batch size or version of them all there is none."""
        return (
            ("plait-answered", str(self.answered)),
            ("plait-failed", str(self.failed)),
            ("plait-queue-us", _us(self.queue_s)),
            ("plait-compute-us", _us(self.compute_s)),
        )


def _us(seconds: float) -> str:
    return str(int(seconds * 1e6))
