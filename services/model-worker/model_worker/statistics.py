"""What each model version has done since the process began, as the protocol's ModelStatistics counts it.

Counters only grow, also over unloading and loading again, so that whoever sums them over a fleet never sees a step back; names, meaning and
nanoseconds are Triton's:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md

Written on the event loop only. `Statistics.all` and every single counter may be read from any thread (metrics are scraped in one of their
own): a counter is a plain int, replaced as a whole, and the versions are copied in one step of the interpreter. Two counters read one after
the other may be a request apart, as those of two scrapes are anyway; `batches` is for the event loop alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from plait.api.inference.v2 import inference_pb2 as pb

_EXACT_ROWS: Final = 32  # above it, powers of two stand for the sizes up to them, or every size up to max_rows would have a counter


@dataclass(slots=True)
class Duration:
    """How often something was done, and how long that took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count it once."""
        self.count += 1
        self.ns += int(seconds * 1e9)


@dataclass(slots=True)
class ModelStatistics:
    """The counters of one version. Durations are by request, `batches` by forward pass and its rows."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)
    rows: int = 0
    executions: int = 0
    last_ms: int = 0
    clock: Callable[[], float] = time.time

    def batch(self, rows: int, compute_s: float) -> None:
        """Count one forward pass over `rows` rows."""
        self.executions += 1
        self.last_ms = int(self.clock() * 1e3)
        size = rows if rows <= _EXACT_ROWS else 1 << (rows - 1).bit_length()
        known = self.batches.get(size)
        if known is None:
            known = self.batches[size] = Duration()
        known.add(compute_s)

    def answered(self, rows: int, total_s: float, *, queue_s: float, input_s: float, compute_s: float, output_s: float) -> None:
        """Count a request that was answered: read for `input_s`, waited, computed as part of batches, and written for `output_s`."""
        self.rows += rows
        self.success.add(total_s)
        self.queue.add(queue_s)
        self.compute_input.add(input_s)
        self.compute_infer.add(compute_s)
        self.compute_output.add(output_s)

    def failed(self, total_s: float) -> None:
        """Count a request that was not answered, for whatever reason (its caller's going away included)."""
        self.fail.add(total_s)

    def describe(self, message: pb.ModelStatistics) -> None:
        """Write the counters into the protocol's message."""
        message.last_inference = self.last_ms
        message.inference_count = self.rows
        message.execution_count = self.executions
        stats = message.inference_stats
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            _describe(getattr(self, name), getattr(stats, name))
        stats.cache_hit.count = stats.cache_miss.count = 0  # present, as clients expect
        for size, duration in sorted(self.batches.items()):
            batch = message.batch_stats.add(batch_size=size)
            _describe(duration, batch.compute_infer)
            batch.compute_input.count = batch.compute_output.count = duration.count


class Statistics:
    """The counters of every version this process has served. They are kept when a version leaves: it may come back."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelStatistics] = {}

    def all(self) -> Mapping[tuple[str, str], ModelStatistics]:
        """Return the counters of every version, by model and version. From any thread: a copy, whose counters go on counting."""
        return dict(self._models)

    @property
    def busy_s(self) -> float:
        """Seconds computed so far, by all models."""
        return sum(duration.ns for counters in self._models.values() for duration in counters.batches.values()) / 1e9

    def of(self, model: str, version: str) -> ModelStatistics:
        """Return the counters of one version; the same ones each time, zero from the first on."""
        known = self._models.get((model, version))
        if known is None:
            known = self._models[model, version] = ModelStatistics()
        return known


def _describe(duration: Duration, message: Any) -> None:
    message.count = duration.count
    message.ns = duration.ns
