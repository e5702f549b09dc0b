"""Rounds in turn: each contender once per round, so that whatever else the machine does meets all of them alike; medians and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.errors import Internal
from plait_bench.load import Tally, Target, closed_loop
from plait_bench.models import Rows
from plait_bench.processes import ServerProcess

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to measure: rounds of `seconds` each after `warm_up_s`; `trial_s` per setting of a peer that is tried."""

    rounds: int
    seconds: float
    warm_up_s: float
    trial_s: float

    @property
    def round_s(self) -> float:
        """Seconds of one contender's round."""
        return self.seconds + self.warm_up_s


FULL = Plan(rounds=5, seconds=2.0, warm_up_s=0.3, trial_s=1.0)
QUICK = Plan(rounds=3, seconds=0.4, warm_up_s=0.1, trial_s=0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to have `rows_per_call` rows scored: whom to call with what, and what must come back."""

    name: str
    server: ServerProcess
    target: Target
    callers: int
    connections: int | None = None
    rows_per_call: int
    scores: Callable[[bytes], Rows] | None = None
    expected: Rows | None = None


@dataclass(slots=True)
class Measured:
    """One contender's rounds."""

    rows_per_call: int
    callers: int
    per_s: list[float] = field(default_factory=list)
    server_cpu_ms: list[float] = field(default_factory=list)
    load_cpu_us: list[float] = field(default_factory=list)
    taken_s: list[float] = field(default_factory=list)
    other_statuses: dict[int, int] = field(default_factory=dict)

    def add(self, tally: Tally, ok: int) -> None:
        """Take a round in."""
        calls = max(sum(tally.statuses.values()), 1)
        self.per_s.append(tally.per_s)
        self.server_cpu_ms.append(tally.server_cpu_s / calls * 1e3)
        self.load_cpu_us.append(tally.cpu_s / calls * 1e6)
        self.taken_s += tally.taken_s
        for status, count in tally.statuses.items():
            if status != ok:
                self.other_statuses[status] = self.other_statuses.get(status, 0) + count

    @property
    def rate(self) -> float:
        """Median calls per second."""
        return statistics.median(self.per_s)

    @property
    def p50_ms(self) -> float:
        """Median latency over all rounds."""
        return percentile_ms(self.taken_s, 50)

    def figures(self) -> dict[str, Any]:
        """Return what goes into the report."""
        return {
            "callers": self.callers,
            "rows_per_call": self.rows_per_call,
            "calls_per_s": self.rate,
            "calls_per_s_rounds": self.per_s,
            "rows_per_s": self.rate * self.rows_per_call,
            "p50_ms": self.p50_ms,
            "p99_ms": percentile_ms(self.taken_s, 99),
            "server_cpu_ms_per_call": statistics.median(self.server_cpu_ms),
            "load_cpu_us_per_call": statistics.median(self.load_cpu_us),
            "calls": len(self.taken_s),
            "other_statuses": {str(status): count for status, count in self.other_statuses.items()},
        }


def percentile_ms(taken_s: Sequence[float], percent: float) -> float:
    """Return a percentile in milliseconds; NaN of nothing."""
    return float(np.percentile(np.array(taken_s), percent) * 1e3) if taken_s else float("nan")


def alternate(contenders: Sequence[Contender], plan: Plan, say: Callable[[str, float], None]) -> dict[str, Measured]:
    """Measure all of them, in turn. `say` hears what was measured and the seconds it took off the plan.

    Raises Internal (BENCH_ANSWER_WRONG) where an answer is not the model's.
    """
    measured = {c.name: Measured(c.rows_per_call, c.callers) for c in contenders}
    for round_ in range(plan.rounds):
        for contender in contenders if round_ % 2 == 0 else reversed(contenders):
            contender.server.check()
            tally = closed_loop(
                contender.target,
                callers=contender.callers,
                connections=contender.connections,
                seconds=plan.seconds,
                warm_up_s=plan.warm_up_s,
                server_cpu_s=contender.server.cpu_s,
            )
            check_answers(contender, tally)
            measured[contender.name].add(tally, contender.target.ok)
            say(f"{contender.name}, {_callers(contender.callers)}: {tally.per_s:.0f} calls/s", plan.round_s)
    return measured


def _callers(count: int) -> str:
    return "1 caller" if count == 1 else f"{count} callers"


def check_answers(contender: Contender, tally: Tally) -> None:
    """Compare the first answer of every connection with what the model says. Raises Internal (BENCH_ANSWER_WRONG)."""
    if not tally.taken_s:
        raise Internal(f"{contender.name} answered no call: statuses {dict(tally.statuses)}", reason="BENCH_ANSWER_WRONG")
    if contender.scores is None or contender.expected is None:
        return
    for body in tally.first_bodies:
        found = contender.scores(body)
        if found.shape != contender.expected.shape or not np.allclose(found, contender.expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise Internal(f"{contender.name} answers other scores than the model", reason="BENCH_ANSWER_WRONG")


def ratios(ours: Measured, other: Measured) -> dict[str, Any]:
    """Compare two that were measured in turn: the median of the rounds' ratios of calls, and their spread; above 1 is in our favour."""
    rounds = [a / b for a, b in zip(ours.per_s, other.per_s, strict=True) if b]
    cpu = statistics.median(other.server_cpu_ms) / max(statistics.median(ours.server_cpu_ms), 1e-9)
    return {
        "calls_per_s": statistics.median(rounds),
        "calls_per_s_lowest": min(rounds),
        "calls_per_s_highest": max(rounds),
        "p50": other.p50_ms / ours.p50_ms,
        "server_cpu_per_call": cpu,
    }


def as_figures(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return all figures by name."""
    return {name: one.figures() for name, one in measured.items()}
